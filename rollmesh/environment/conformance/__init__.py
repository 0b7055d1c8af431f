"""Checks any implementation of an environment, in any language, over the wire alone."""

from rollmesh.environment.conformance.checking import RULES, Report, check
from rollmesh.environment.conformance.rules import Rule, Verdict

__all__ = ["RULES", "Report", "Rule", "Verdict", "check"]

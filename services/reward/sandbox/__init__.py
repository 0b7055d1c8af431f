"""The sandbox: untrusted Python runs here or not at all."""

from services.reward.sandbox.choice import sandbox
from services.reward.sandbox.limits import Limits, Outcome, Program
from services.reward.sandbox.places import Place, Running, Sandbox

__all__ = ["Limits", "Outcome", "Place", "Program", "Running", "Sandbox", "sandbox"]

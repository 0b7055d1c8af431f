"""Environments of other frameworks, served as our own; their packages: the extra `environments`."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import TYPE_CHECKING

from rollmesh.errors import FailedPrecondition, InvalidRequest

if TYPE_CHECKING:
    from rollmesh.environment.author import Environment

PACKAGES = {"gymnasium": "gymnasium", "openenv": "openenv-core", "verifiers": "verifiers"}
"""What a spec may begin with, and the package that it needs."""


def adapted(spec: str, *, num_tasks: int, max_turns: int) -> Environment:
    """The environment that `spec` names: gymnasium:ID, openenv:URL or verifiers:ID.

    Args:
        spec: what it is.
        num_tasks: most tasks of a split, or as many as are made where it has no own.
        max_turns: actions of one episode.

    Raises:
        InvalidRequest: the spec is none of these, or what it names cannot be told in text.
        FailedPrecondition: the framework's package is not installed.
        Unavailable: the environment's own server does not answer.
    """
    framework, colon, name = spec.partition(":")
    if framework not in PACKAGES or not colon or not name:
        allowed = ", ".join(f"{each}:…" for each in PACKAGES)
        raise InvalidRequest(
            f"spec: {spec[:200]!r} is none of {allowed}",
            field="spec",
            value=spec[:200],
            allowed=allowed,
        )
    if importlib.util.find_spec(framework) is None:
        raise FailedPrecondition(
            f"{framework}: environments need the package {PACKAGES[framework]}, which is not "
            "installed: pip install 'rollmesh[environments]'",
            resource=PACKAGES[framework],
        )
    adapter = importlib.import_module(f"rollmesh.environment.adapters.{framework}")
    made: Environment = adapter.adapt(name, num_tasks=num_tasks, max_turns=max_turns)
    return made


def name_of(text: str) -> str:
    """`text` as near as an environment's name can come to it."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"e-{name}")[:63].rstrip("-")

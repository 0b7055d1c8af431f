"""What environments say of themselves: whether it can be, and whether two say the same."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from rollmesh.errors import EnvironmentFailed
from rollmesh.names import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh import chat

_MAY_DIFFER = ("name", "description", "limits")


def described(infos: Sequence[chat.EnvironmentInfo], name: str) -> chat.EnvironmentInfo:
    """The one of `infos`, of one server, that it calls `name`.

    Raises:
        EnvironmentFailed: there is none, or it cannot be.
    """
    info = next((info for info in infos if info.name == name), None)
    if info is None:
        there = ", ".join(repr(info.name[:63]) for info in infos[:10]) or "none"
        raise EnvironmentFailed(f"the server has no environment {name!r}; it has {there}")
    problem = _problem(info)
    if problem:
        raise EnvironmentFailed(f"Describe: {problem}")
    return info


def _problem(info: chat.EnvironmentInfo) -> str:
    limits = info.limits
    checks = {
        "version is empty": not info.version,
        "neither has_score nor has_episodes is set": not (info.has_score or info.has_episodes),
        "observation_kinds has none that is known here": not info.observation_kinds,
        "splits is empty": not info.splits,
        "a split's name is not 1–63 of a-z, 0-9 and '-'": not all(
            re.fullmatch(ID_PATTERN, split.name) for split in info.splits
        ),
        "a limit is negative": min(
            limits.max_concurrent_episodes,
            limits.max_score_batch,
            limits.max_turns,
            limits.max_answer_s or 0.0,
        )
        < 0,
    }
    return next((problem for problem, found in checks.items() if found), "")


def difference(info: chat.EnvironmentInfo, agreed: chat.EnvironmentInfo) -> str:
    """What tells a replica that says `info` from the others; empty: nothing that matters.

    How many episodes it takes at once is its own business: the machines may not be alike.
    """
    if info.version != agreed.version:
        return f"it serves version {info.version[:63]!r}, the others {agreed.version[:63]!r}"
    differing = [
        each.name
        for each in fields(info)
        if each.name not in _MAY_DIFFER and getattr(info, each.name) != getattr(agreed, each.name)
    ]
    if _shared(info) != _shared(agreed):
        differing.append("limits")
    if differing:
        return f"it has the others' version and differs in {', '.join(differing)}"
    return ""


def _shared(info: chat.EnvironmentInfo) -> chat.Limits:
    return replace(info.limits, max_concurrent_episodes=0)

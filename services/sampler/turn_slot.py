"""A slot of the engine as the policy of `turns` sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Swap(NamedTuple):
    """Work to do in the engine: unload one adapter, then load another (None: do not)."""

    out: int | None
    into: int | None


@dataclass
class Slot:
    """An adapter in a slot, or on its way into it."""

    since: float
    policy: str
    loading: bool = True
    closing: bool = False
    """No request begins; when those that run have ended, the slot is another adapter's."""
    forgotten: bool = False
    users: int = 0
    served: bool = False
    """A request has begun in this turn."""
    idle_since: float = 0.0
    closed_at: float = 0.0
    closed_with: int = 0
    """Completions that ran when it was closed, …"""
    ran_on_s: float = 0.0
    """… and for how long after that, those that have ended, in all."""

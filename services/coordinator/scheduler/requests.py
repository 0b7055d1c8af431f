"""What the scheduler knows of requests and samplers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

Policy = tuple[str, int]
"""An adapter's name and policy_version."""


@dataclass(frozen=True, slots=True)
class Request:
    """A sample request. `policy` None: the base model itself.

    `max_tokens`: of each completion; None: as many as the sampler allows. `prefixes`: how long, and
    a key of it, for some prefixes of its prompt, the shortest first; equal keys share keys and
    values. `resumed`: it has been given a place before, and goes before all that its project has
    waiting in its class. `anew`: and none of its completions has begun. `avoid`: where it was lost
    last. `job`: name of the one that it is for; empty: it is interactive. `priority`: its class,
    see PRIORITIES. `preemptible`: it can go on elsewhere with what it has drawn.
    """

    id: int
    project: str
    base_model: str
    policy: Policy | None
    num_prompt_tokens: int
    num_completions: int
    max_tokens: int | None = None
    prefixes: tuple[tuple[int, int], ...] = ()
    resumed: bool = False
    anew: bool = False
    avoid: str = ""
    job: str = ""
    priority: int = 0
    preemptible: bool = True

    @property
    def subject(self) -> str:
        """What it is told by."""
        return request_name(self.project, self.id)


def request_name(project: str, number: int) -> str:
    """What a request of `project` is told by: it lives as long as it waits and has no resource."""
    return f"projects/{project}/requests/{number}"


@dataclass(frozen=True, slots=True)
class SamplerState:
    """A sampler that serves, as it was last heard of.

    `loaded`: the policies that it holds. `resident`: those in its engine's slots, of which it has
    `max_loras`; 0: not told. `num_queued`: requests that wait there. `full`: it takes none now.
    `refused_by`: jobs that ask nothing of it.
    """

    address: str
    base_model: str
    loaded: Collection[Policy]
    resident: Collection[Policy] = ()
    max_loras: int = 0
    num_queued: int = 0
    full: bool = False
    refused_by: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Assignment:
    """`request` goes to the sampler at `address` now."""

    request: Request
    address: str

"""What a request costs on each sampler: the tokens that would be drawn there until it has begun.

Everything is counted in drawn tokens, so that a sampler which holds the policy and has a long line
loses to an idle one that has to pull it. The constants are rough on purpose: they need to be right
within a factor of a few for the order to be.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.coordinator.scheduler.requests import Policy, Request, SamplerState

LOAD_TOKENS = 64
"""Filling a free slot from what the sampler has pulled: milliseconds."""
SWITCH_TOKENS = 512
"""Waiting until a slot is free: whoever has it runs out its quantum first."""
PULL_TOKENS = 1024
"""Pulling and verifying what is not there at all: tenths of a second."""
QUEUED_TOKENS = 64
"""A request in the sampler's own line, which is there for want of a slot or of memory."""
LOST_TOKENS = 4096
"""Going back to where the request was just lost."""
PROMPT_TOKENS_PER_DRAWN = 4
"""A prompt's tokens are computed side by side and cost less than drawn ones."""
EXPECTED_LENGTH = 64
"""Tokens of a completion of a project that has not finished any."""

MAX_PREFIXES = 4096
"""Keys remembered of each sampler."""
_SHORTEST_PREFIX = 32


def prefixes_of(
    project: str, policy: Policy | None, prompt_token_ids: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Length and key of the prefixes of 32, 64, 128, … tokens.

    Only requests of one project and policy share keys and values.
    """
    prefixes = []
    length = _SHORTEST_PREFIX
    while length <= len(prompt_token_ids):
        prefixes.append((length, hash((project, policy, tuple(prompt_token_ids[:length])))))
        length *= 2
    return tuple(prefixes)


class Prefixes:
    """The prefixes that one sampler computed last."""

    def __init__(self) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()

    def shared(self, request: Request) -> int:
        """Tokens of the longest prefix of `request` that is remembered."""
        for length, key in reversed(request.prefixes):
            if key in self._keys:
                return length
        return 0

    def remember(self, request: Request) -> None:
        """`request` is computed there now."""
        for _, key in request.prefixes:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > MAX_PREFIXES:
            self._keys.popitem(last=False)


@dataclass(slots=True)
class Line:
    """What the coordinator has under way on one sampler: completions, and the tokens to come."""

    num_requests: int = 0
    num_completions: int = 0
    num_tokens: int = 0
    policies: Counter[Policy] = field(default_factory=Counter)


def cost_of_line(sampler: SamplerState, line: Line) -> int:
    """Tokens drawn on `sampler` before what comes now has its turn."""
    return line.num_tokens + QUEUED_TOKENS * sampler.num_queued


def cost_of_place(request: Request, sampler: SamplerState, line: Line, prefixes: Prefixes) -> float:
    """Tokens drawn there meanwhile, until `request` has its policy and its prompt."""
    saved = prefixes.shared(request) / PROMPT_TOKENS_PER_DRAWN if request.prefixes else 0
    lost = LOST_TOKENS if sampler.address == request.avoid else 0
    return _cost_of_policy(request, sampler, line) + lost - saved


def most_saved(request: Request) -> float:
    """What a sampler may save that computed its prompt before."""
    return request.prefixes[-1][0] / PROMPT_TOKENS_PER_DRAWN if request.prefixes else 0


def _cost_of_policy(request: Request, sampler: SamplerState, line: Line) -> int:
    policy = request.policy
    # What runs there has a slot or is about to get it, whatever was heard of the sampler last.
    if policy is None or policy in line.policies or policy in sampler.resident:
        return 0
    slot = LOAD_TOKENS
    # The union is only made where it may matter.
    if 0 < sampler.max_loras <= len(sampler.resident) + len(line.policies):
        taken = {*sampler.resident, *line.policies}
        slot = SWITCH_TOKENS if sampler.max_loras <= len(taken) else LOAD_TOKENS
    return slot if policy in sampler.loaded else slot + PULL_TOKENS


def outstanding_tokens(
    request: Request, expected_length: float, num_tokens: int, num_completions: int
) -> int:
    """Tokens that an assigned request is still to cost.

    It has got `num_tokens`, and so many of its completions are not ended.
    """
    prompt = 0 if num_tokens else request.num_prompt_tokens / PROMPT_TOKENS_PER_DRAWN
    each = max(expected_length - num_tokens / request.num_completions, 1)
    return round(prompt + each * num_completions)


def expected_length(request: Request, of_project: float) -> float:
    """Tokens that a completion of `request` may have; those of its project had `of_project`."""
    expected = of_project or EXPECTED_LENGTH
    return expected if request.max_tokens is None else min(expected, request.max_tokens)

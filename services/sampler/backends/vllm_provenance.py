"""Which policy computes each row of each batch, checked at every step in vLLM's worker.

A request says which policy it asked for, and so carries its own proof: what was read back from the
slot that its tokens use must be that, and so must be what wrote the cached keys and values that it
reads. A step of which that is not true has no tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from services.sampler.backends.vllm_draws import Rows, stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ARGUMENT = "rollmesh"


class IdentityError(Exception):
    """Tokens are about to be drawn from, or with the help of, another policy than was asked for."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for, on its way to the worker. `number` 0, `digest` "": the base model.

    `indices`: of its completions. `place`: of the first token that it draws.
    """

    number: int
    digest: str
    project: str
    seed: int
    indices: list[int]
    place: int
    sampled_logprobs: bool

    def extra_args(self) -> dict[str, Any]:
        """For vLLM's SamplingParams."""
        return {_ARGUMENT: asdict(self)}

    @classmethod
    def of(cls, params: Any) -> Asked:
        """What SamplingParams say."""
        extra = params and params.extra_args
        if not extra or _ARGUMENT not in extra:
            raise IdentityError("a request does not say which policy it asks for")
        return cls(**extra[_ARGUMENT])

    @cached_property
    def owner(self) -> int:
        """Who may read the keys and values that this request writes."""
        text = f"{self.digest} {self.project}".encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), signed=True)

    def stream_of(self, request_id: str) -> int:
        """Its random stream. vLLM puts a number before the ids of requests that it multiplies."""
        child = int(request_id.partition("_")[0]) if len(self.indices) > 1 else 0
        return stream(self.seed, self.indices[child])


class BlockLedger:
    """Who wrote each block of keys and values, by block id.

    Block 0 is vLLM's placeholder for blocks that nobody reads.
    """

    def __init__(self, num_blocks: int, block_sizes: Sequence[int]) -> None:
        self._owners = np.zeros(num_blocks, np.int64)
        self._block_sizes = block_sizes

    def step(self, output: Any, asked: dict[str, Asked]) -> None:
        """Take in which requests of a scheduler's output write and read which blocks.

        Raises:
            IdentityError: one reads a block of another policy's or project's.
        """
        cached = output.scheduled_cached_reqs
        reads: list[tuple[str, NDArray[np.int64]]] = []
        for new in output.scheduled_new_reqs:
            reads += self._begin(new.req_id, asked, new.block_ids, new.num_computed_tokens)
        for index, new_ids in enumerate(cached.new_block_ids):
            if new_ids is None:
                continue
            request_id = cached.req_ids[index]
            # All blocks of a resumed request are new to it.
            resumed = request_id in cached.resumed_req_ids
            num_cached = cached.num_computed_tokens[index] if resumed else 0
            reads += self._begin(request_id, asked, new_ids, num_cached)
        # A request may read what another one writes in the same step.
        for request_id, blocks in reads:
            if (self._owners[blocks] != asked[request_id].owner).any():
                raise IdentityError(
                    f"request {request_id} reads keys and values that another policy or project "
                    "wrote"
                )

    def _begin(
        self,
        request_id: str,
        asked: dict[str, Asked],
        block_ids: Sequence[Sequence[int]],
        num_cached: int,
    ) -> list[tuple[str, NDArray[np.int64]]]:
        """Take in what a request writes; return what it reads."""
        reads = []
        for block_size, group in zip(self._block_sizes, block_ids, strict=True):
            blocks = np.array(group, np.int64)
            num_read = -(-num_cached // block_size)
            self._owners[blocks[num_read:]] = asked[request_id].owner
            if num_read:
                read = blocks[:num_read]
                reads.append((request_id, read[read != 0]))
        return reads


class Provenance:
    """What every request in the worker asked for, and whether each step keeps to it."""

    def __init__(self, ledger: BlockLedger, slots: Any) -> None:
        self._ledger = ledger
        self._slots = slots
        self._asked: dict[str, Asked] = {}
        self._stream_of: dict[str, int] = {}
        self._request_ids: list[str] = []
        self._changes = -1

    def begin(self, output: Any) -> None:
        """Before the forward pass of a scheduler's output."""
        for request_id in output.finished_req_ids:
            self._asked.pop(request_id, None)
            self._stream_of.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            asked = Asked.of(new.sampling_params)
            self._asked[new.req_id] = asked
            self._stream_of[new.req_id] = asked.stream_of(new.req_id)
        self._ledger.step(output, self._asked)

    def check(self, batch: Any, num_scheduled: dict[str, int]) -> Rows:
        """After it: whether each token used the slot that its request asked for; how rows draw.

        Raises:
            IdentityError: one did not, or that slot is not known to hold what was asked for.
        """
        request_ids: list[str] = batch.req_ids
        # Most batches are of the same requests as the one before.
        if request_ids != self._request_ids or self._changes != self._slots.changes:
            self._take_rows(list(request_ids))
        num_rows = len(request_ids)
        num_tokens = np.array([num_scheduled[request_id] for request_id in request_ids])
        expected = np.repeat(self._slot_of_row, num_tokens)
        used = self._slots.used_by_tokens()
        if not np.array_equal(used, expected):
            raise IdentityError(self._told(used, num_tokens))
        places = (
            batch.num_computed_tokens_cpu[:num_rows]
            + num_tokens
            - batch.num_prompt_tokens[:num_rows]
            + self._places
        )
        return Rows(self._streams, places, self._sampled)

    def _take_rows(self, request_ids: list[str]) -> None:
        asked = [self._asked[request_id] for request_id in request_ids]
        policies = [(one.number, one.digest) for one in asked]
        slots = {policy: self._slots.slot_of(*policy) for policy in set(policies)}
        self._slot_of_row = np.array([slots[policy] for policy in policies])
        self._streams = np.array([self._stream_of[name] for name in request_ids], np.uint64)
        self._places = np.array([one.place for one in asked])
        self._sampled = np.array([one.sampled_logprobs for one in asked])
        self._request_ids, self._changes = request_ids, self._slots.changes

    def _told(self, used: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> str:
        if len(used) != num_tokens.sum():
            return f"{len(used)} tokens have slots, {num_tokens.sum()} are computed"
        rows = np.repeat(np.arange(len(num_tokens)), num_tokens)
        token = int((used != self._slot_of_row[rows]).argmax())
        row = rows[token]
        return (
            f"request {self._request_ids[row]} is computed with slot {used[token]}, the policy "
            f"that it asked for is in {self._slot_of_row[row]} (-1: the base model)"
        )

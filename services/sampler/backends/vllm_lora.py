"""LoRA for mixed batches on a CPU.

vLLM's CPU kernels take the slot of each token, −1 for the base model, as an index, and −1 is
the last slot: a token of the base model beside tokens of adapters gets the adapter that happens to
be there. They also copy both factors once per token.

Here the tokens are put into blocks of one slot each, and all blocks of a batch are one batched
product. What a token gets depends on other tokens in one way: the number of rows of a block follows
from the batch, and the processor may sum a product in another order for another number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MIN_ROWS, MAX_ROWS = 16, 256
"""Of a block: fewer are no faster, with more the rows left over cost too much."""
_BLOCK_COST = 8
"""Of one more block: that of so many rows."""
_MAX_PARTS = 6
"""Blocks that the largest slot is split into, unless they would be too large."""
_BITS = {2: torch.int16, 4: torch.int32}
RANK_STEP = 8
"""Ranks are rounded up to what the processor multiplies at once anyway."""


@dataclass(slots=True)
class Known:
    """What is known of packed layers: ranks [slots], and the rank for the batch of `blocks`.

    They hold as long as torch counts the same number of writes, `versions`, to `lora_a`: vLLM
    writes only to load and unload.
    """

    lora_a: Sequence[torch.Tensor]
    versions: list[int]
    ranks: NDArray[np.int64]
    blocks: Blocks | None = None
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Blocks:
    """T tokens as N blocks of R rows.

    `slots` [N]: of each block, `span` the same where they are consecutive. `tokens` [N·R]: in each
    row; one that is left over holds any token. `rows` [T]: of each token, counted from 1; 0 is that
    of tokens without an adapter. None for both: row i is token i.
    """

    slots: torch.Tensor
    span: slice | None
    tokens: torch.Tensor | None
    rows: torch.Tensor | None
    num_rows: int

    def of_blocks(self, stacked: torch.Tensor) -> torch.Tensor:
        """[slots, 1, …] → [N, …]: the part of each block's slot."""
        if self.span is not None:
            return stacked[self.span, 0]
        return stacked[:, 0].index_select(0, self.slots)


def blocks_of(slots: torch.Tensor) -> Blocks | None:
    """Blocks for tokens of these slots [T], −1 for none; None if no token has one."""
    order = torch.argsort(slots, stable=True)
    found, counts = torch.unique_consecutive(slots[order], return_counts=True)
    if len(found) and found[0] < 0:
        order, found, counts = order[int(counts[0]) :], found[1:], counts[1:]
    if not len(found):
        return None
    if len(found) == 1 and len(order) == len(slots):
        return Blocks(found, _span(found), None, None, len(slots))
    num_rows = _rows_of_blocks(counts)
    num_blocks = -(-counts // num_rows)
    first_rows = (num_blocks.cumsum(0) - num_blocks) * num_rows
    first_tokens = counts.cumsum(0) - counts
    places = torch.arange(len(order)) + (first_rows - first_tokens).repeat_interleave(counts)
    tokens = torch.zeros(int(num_blocks.sum()) * num_rows, dtype=torch.long)
    tokens[places] = order
    rows = torch.zeros(len(slots), dtype=torch.long)
    rows[order] = places + 1
    of_blocks = found.repeat_interleave(num_blocks)
    return Blocks(of_blocks, _span(of_blocks), tokens, rows, num_rows)


def _rows_of_blocks(counts: torch.Tensor) -> int:
    """How many rows make the cheapest blocks for so many tokens of each slot."""
    found: list[int] = counts.tolist()
    # Beside a large slot the few tokens of another fill a block alone: to split it can be cheaper.
    whole = [-(-max(found) // parts) for parts in range(1, _MAX_PARTS + 1)]
    sizes = {min(max(size, MIN_ROWS), MAX_ROWS) for size in whole}

    def cost(size: int) -> int:
        return sum(-(-count // size) for count in found) * (size + _BLOCK_COST)

    return min(sizes, key=cost)


def _span(slots: torch.Tensor) -> slice | None:
    first = int(slots[0])
    span = slice(first, first + len(slots))
    return span if torch.equal(slots, torch.arange(span.start, span.stop)) else None


class SlotwiseLora(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM is untyped to mypy
    """LoRA of a batch whose tokens use different slots or none.

    Of each of the layers that vLLM has packed into one, lora_a: [slots, 1, rank, in] and lora_b:
    [slots, 1, out, rank], where rank is the largest that is allowed and the rest of a slot is zero.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slots = torch.empty(0, dtype=torch.long)
        self._blocks: Blocks | None = None
        self._known: dict[int, Known] = {}

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take in which slot each token of the next batch uses."""
        super().update_metadata(*args, **kwargs)
        slots = self.token_lora_indices
        if not torch.equal(slots, self._slots):  # most steps: every request draws one more token
            self._slots = slots.clone()
            self._blocks = blocks_of(self._slots)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
        **_: Any,
    ) -> None:
        """Add scale × x·Aᵀ·Bᵀ of each packed layer to its columns of y."""
        blocks = self._blocks
        if blocks is None:
            return
        rank = self._rank(lora_a_stacked, blocks)
        if not rank:
            return
        if blocks.tokens is not None:
            x = x.index_select(0, blocks.tokens)
        lora_a = [blocks.of_blocks(a[:, :, :rank]) for a in lora_a_stacked]
        shrunk = torch.bmm(
            x.view(len(blocks.slots), blocks.num_rows, -1),
            (lora_a[0] if len(lora_a) == 1 else torch.cat(lora_a, 1)).transpose(1, 2),
        )
        if scale != 1:
            shrunk *= scale
        update = y.new_empty(1 + len(x), sum(output_slices))
        update[0] = 0
        in_blocks = update[1:].view(*shrunk.shape[:2], -1)
        columns = torch.split(in_blocks, list(output_slices), 2)
        for part, lora_b, out in zip(
            torch.split(shrunk, rank, 2), lora_b_stacked, columns, strict=True
        ):
            torch.bmm(part, blocks.of_blocks(lora_b[..., :rank]).transpose(1, 2), out=out)
        y += update[1:] if blocks.rows is None else update.index_select(0, blocks.rows)

    def _rank(self, lora_a: Sequence[torch.Tensor], blocks: Blocks) -> int:
        """The largest rank in the slots of this batch, rounded up; 0: none adapts these layers."""
        versions = [a._version for a in lora_a]  # noqa: SLF001 - torch's own name for it
        known = self._known.get(id(lora_a))
        if known is None or known.versions != versions:
            known = self._known[id(lora_a)] = Known(lora_a, versions, _ranks(lora_a))
        if known.blocks is not blocks:
            rank = int(known.ranks[blocks.slots.numpy()].max())
            known.blocks = blocks
            known.rank = min(-(-rank // RANK_STEP) * RANK_STEP, lora_a[0].shape[2])
        return known.rank

    def wrote(self, lora_a: Sequence[torch.Tensor], slot: int, rank: int) -> None:
        """One slot of packed layers was overwritten: the largest rank in it is this now.

        To find that out again takes longer than the writing. It is where there were other writes.
        """
        known = self._known.get(id(lora_a))
        versions = [a._version for a in lora_a]  # noqa: SLF001
        if known is not None and versions == [version + 1 for version in known.versions]:
            known.ranks[slot] = rank
            known.versions = versions
            known.blocks = None

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: VllmBackend refuses adapters of the embedding."""

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: VllmBackend refuses adapters of the unembedding."""


def _ranks(lora_a: Sequence[torch.Tensor]) -> NDArray[np.int64]:
    """Of each slot: the rows of A up to its last that is not zero, of the largest packed layer."""
    # As bits: numpy has no bfloat16, and is faster than torch. A negative zero counts as a row.
    used = [a[:, 0].view(_BITS[a.element_size()]).numpy().any(2) for a in lora_a]
    last = np.logical_or.reduce(used) * np.arange(1, lora_a[0].shape[2] + 1)
    found: NDArray[np.int64] = last.max(1)
    return found

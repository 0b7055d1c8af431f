"""Linear layers that many adapters share in one pass: whose bits depend on nobody else.

What is computed over everybody's rows must give a row the same bits whoever its neighbours are:
- The base product runs in blocks of BLOCK_ROWS rows, the last one filled up with zeros, because a
  matrix product picks its kernel, and so the order of its sums, by the number of rows. In a block
  of a fixed size a row's bits depend neither on its place nor on the other rows, be they NaN.
- An adapter's own products run over the rows of one unit at a time, whose number depends on that
  adapter's batch alone, and its factors' gradients are kept per unit. Units are multiples of 32
  positions long, so that what norms compute of each row comes in whole vectors too.
- Activation functions are computed in vectors, and what is left over at the end of each thread's
  share one by one, with other roundings. Nothing is ever left over: see `whole_vectors`.
- What comes in is made contiguous: a view's strides can depend on how many sequences there are.
- Norms, attention and softmax work on one row, or one head of one sequence, whatever else there is
  (but not where it is the only one: a pass has two sequences or more, see passes.py);
  sums and products of elements are exact in any order of the elements.
This is for float32 on a CPU. A GPU computes the whole base product at once; its bits may depend on
the number of rows.
Legend: N rows of the pass, S rows of a segment, I inputs and O outputs of a layer, R rank.
"""

# ruff: noqa: N803, N806, N815 - shape suffixes

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from rollmesh.errors import Unimplemented

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BLOCK_ROWS = 256
# Elements that torch's loops take at once with the widest vectors there are, and the least that
# it gives a thread of its own (at::internal::GRAIN_SIZE).
_VECTOR = 64
_GRAIN = 32768


class Factors(NamedTuple):
    """The update of one layer is scale × B·A."""

    a_RI: Tensor
    b_OR: Tensor


class Segment(NamedTuple):
    """Rows of one unit, the factors for them, and where a pass backward puts their gradients."""

    start: int
    stop: int
    scale: float
    factors: Factors
    gradients: dict[str, Factors]


class SharedLinear:
    """Takes the place of the forward of an nn.Linear.

    Attributes:
        segments: of the pass under way, those whose adapters change this layer.
        num_rows: of that pass that are somebody's.
    """

    def __init__(self, name: str, layer: nn.Linear) -> None:
        self.name = name
        self.weight_OI = layer.weight
        self.bias_O = layer.bias
        self.segments: list[Segment] = []
        self.num_rows = 0
        # Makes the output take gradients where the input takes none, as in the first layer.
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for `x`, with each segment's update."""
        if self.segments and x.numel() < self.num_rows * x.shape[-1]:
            raise Unimplemented(
                f"the layer {self.name} is given only some of the positions, as experts are: it "
                "cannot be adapted",
                field="lora.target_modules",
                value=self.name,
            )
        anchor = self._anchor if self.segments else None
        output: Tensor = _Apply.apply(x, anchor, self)  # type: ignore[no-untyped-call]
        return output


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor | None, layer: SharedLinear) -> Tensor:
        # A layout can depend on the number of sequences in the pass, and bits on the layout.
        x_NI = x.reshape(-1, x.shape[-1]).contiguous()
        y_NO = _product(x_NI, layer.weight_OI.t())
        if layer.bias_O is not None:
            y_NO += layer.bias_O
        reduced = []
        for segment in layer.segments:
            rows = slice(segment.start, segment.stop)
            reduced_SR = x_NI[rows].float() @ segment.factors.a_RI.t()
            reduced_SR *= segment.scale
            # Products with few columns, or few rows of the first factor, are several times slower
            # where the long side is not the contiguous one.
            b_RO = segment.factors.b_OR.t().contiguous()
            _add_product(y_NO[rows], reduced_SR, b_RO)
            reduced.append((reduced_SR, b_RO))
        ctx.layer, ctx.segments, ctx.reduced = layer, layer.segments, reduced
        if layer.segments:
            ctx.save_for_backward(x_NI)
        # No view, as autograd sees it: some models change a layer's output in place.
        shape = (*x.shape[:-1], y_NO.shape[-1])
        output: Tensor = torch.ops.aten._unsafe_view(y_NO, shape)  # noqa: SLF001
        return output

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, None, None]:
        layer: SharedLinear = ctx.layer
        gy_NO = gy.reshape(-1, gy.shape[-1]).contiguous()
        gx_NI = _product(gy_NO, layer.weight_OI) if ctx.needs_input_grad[0] else None
        for segment, (reduced_SR, b_RO) in zip(ctx.segments, ctx.reduced, strict=True):
            rows = slice(segment.start, segment.stop)
            (x_NI,) = ctx.saved_tensors
            gy_SO = gy_NO[rows].float()
            g_SR = gy_SO @ b_RO.t()
            g_SR *= segment.scale
            found = Factors(g_SR.t() @ x_NI[rows].float(), (reduced_SR.t() @ gy_SO).t())
            if before := segment.gradients.get(layer.name):  # a layer that the model runs twice
                found = Factors(*(old + new for old, new in zip(before, found, strict=True)))
            segment.gradients[layer.name] = found
            if gx_NI is not None:
                _add_product(gx_NI[rows], g_SR, segment.factors.a_RI)
        gx = None if gx_NI is None else gx_NI.view(*gy.shape[:-1], -1)
        return gx, None, None


def _product(x_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """x·W, on a CPU in blocks of a fixed number of rows."""
    if x_NI.device.type != "cpu":
        return x_NI @ weight_IO
    num_rows = len(x_NI)
    num_blocks = -(-num_rows // BLOCK_ROWS)
    y = x_NI.new_empty(num_blocks * BLOCK_ROWS, weight_IO.shape[1])
    for start in range(0, len(y), BLOCK_ROWS):
        block = x_NI[start : start + BLOCK_ROWS]
        if missing := BLOCK_ROWS - len(block):
            block = pad(block, (0, 0, 0, missing))
        torch.mm(block, weight_IO, out=y[start : start + BLOCK_ROWS])
    return y[:num_rows]


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left·right, float32, to `target`, whatever its precision; the sum is rounded once."""
    if target.dtype == torch.float32:
        target.addmm_(left, right)
    else:
        target.copy_(torch.addmm(target.float(), left, right))


def whole_vectors(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`activation`, an elementwise function, filled up so that each thread gets whole vectors."""

    def filled_up(x: Tensor) -> Tensor:
        size = x.numel()
        padding = _padding(size)
        if not padding and x.is_contiguous():
            return activation(x)
        return activation(pad(x.reshape(-1), (0, padding)))[:size].view(x.shape)

    return filled_up


def _padding(size: int) -> int:
    """Elements to add so that the equal shares of torch's threads are whole vectors."""
    filled = size
    while True:
        # Most functions give a thread at least a grain; some, such as GELU, use all threads.
        num_threads = torch.get_num_threads()
        step = _VECTOR * math.lcm(num_threads, min(num_threads, -(-filled // _GRAIN)))
        if filled % step == 0:
            return filled - size
        filled += step - filled % step

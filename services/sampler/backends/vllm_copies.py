"""Loading by copying alone, once it is known what becomes of files of one kind.

After vLLM has loaded a file in its own way, and every bit of the slot was found right, the way is
remembered that leads to the very same bits in a fifth of the time. It is used for files with the
same header and configuration only, and if it was tried on one whose tensors all differ.
"""

from __future__ import annotations

import json
import operator
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from services.sampler.backends.vllm_identity import MismatchError, bits_of, stacks_of
from services.sampler.backends.vllm_ways import stored_by, way_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from services.sampler.backends.vllm_ways import Way

_MAX_WAYS = 64
"""Of which each takes some 100 KB."""

Kind = tuple[bytes, str]
"""What files have in common that go the same way: a header, and a configuration."""


class Stacks:
    """The tensors that the kernels read, each [slots, …]. `flat` as in `vllm_ways`."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self._modules = modules
        self._held = self._now()
        self._sizes = [stack[0].numel() for stack in self._held]
        self._of_slot: dict[int, list[torch.Tensor]] = {}

    def _now(self) -> list[torch.Tensor]:
        modules = self._modules.values()
        of_a = [stack for module in modules for stack in stacks_of(module.lora_a_stacked)]
        of_b = [stack for module in modules for stack in stacks_of(module.lora_b_stacked)]
        return of_a + of_b

    @property
    def valid(self) -> bool:
        """They still are what the kernels read."""
        now = self._now()
        return len(now) == len(self._held) and all(map(operator.is_, now, self._held))

    def write(self, slot: int, flat: torch.Tensor) -> None:
        """Overwrite all that the slot holds."""
        torch._foreach_copy_(self._views(slot), torch.split(flat, self._sizes))

    def read(self, slot: int) -> torch.Tensor:
        """What the slot holds, as a copy."""
        return torch.cat(self._views(slot))

    def _views(self, slot: int) -> list[torch.Tensor]:
        if slot not in self._of_slot:
            self._of_slot[slot] = [stack[slot].view(-1) for stack in self._held]
        return self._of_slot[slot]


class Copies:
    """Loads of the slots of `modules`, which with `packed` and `parse` are as of `way_of`.

    The ways that were used least recently are forgotten.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        packed: Mapping[str, Sequence[str]],
        dtype: torch.dtype,
        parse: Callable[[str], tuple[str, bool]],
        wrote: Callable[[Sequence[torch.Tensor], int, int], None],
    ) -> None:
        """`wrote` as of `SlotwiseLora`."""
        self._modules = modules
        self._packed = packed
        self._dtype = dtype
        self._parse = parse
        self._wrote = wrote
        self._stacks = Stacks(modules)
        self._ways: OrderedDict[Kind, Way] = OrderedDict()

    def find(self, kind: Kind) -> Way | None:
        """The way of files of this kind, if it is known."""
        if not self._stacks.valid:
            self._ways.clear()
            self._stacks = Stacks(self._modules)
        way = self._ways.get(kind)
        if way is not None:
            self._ways.move_to_end(kind)
        return way

    def put(self, way: Way, slot: int, flat: torch.Tensor) -> None:
        """Write what `way` made of a file into a slot, and read it back.

        Raises:
            MismatchError: the slot holds something else.
        """
        self._stacks.write(slot, flat)
        if not _same(self._stacks.read(slot), flat):
            raise MismatchError(f"slot {slot} does not hold the adapter's tensors")
        if way.full_rank(flat):
            ranks = iter(way.ranks)
            for module in self._modules.values():
                stacks = module.lora_a_stacked
                self._wrote(stacks, slot, max(next(ranks) for _ in stacks_of(stacks)))

    def learn(self, kind: Kind, file: NDArray[np.uint8], slot: int) -> None:
        """Remember the way of such files as this one, which the slot holds, if there is one."""
        header, config_json = kind
        stored = stored_by(header)
        if stored is None:
            return
        values = torch.frombuffer(file, dtype=stored.dtype, offset=stored.begin)
        tensors = {bits_of(tensor).tobytes() for tensor in torch.split(values, stored.sizes)}
        if len(tensors) < len(stored.sizes) or not all(map(any, tensors)):
            # As in a fresh adapter, whose Bs are zero: it does not tell where they go.
            return
        config = json.loads(config_json)
        way = way_of(header, config, self._modules, self._packed, self._dtype, self._parse)
        flat = None if way is None else way.flat_of(file)
        if way is None or flat is None or not _same(flat, self._stacks.read(slot)):
            return
        self._ways[kind] = way
        if len(self._ways) > _MAX_WAYS:
            self._ways.popitem(last=False)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    # As bytes: numpy and torch make an array of booleans first.
    return bits_of(one).tobytes() == bits_of(other).tobytes()

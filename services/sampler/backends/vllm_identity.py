"""Is what the slots of vLLM's LoRA kernels hold what an adapter's file says? Compared bit for bit.

Expected values are derived from the file without vLLM's code: cast to the engine's type, the
scaling multiplied into B, this rank's part cut out. A slot holds them and zeros, nothing else; a
tensor of the file that no slot holds is an error, as vLLM leaves out what it does not know.

Shapes: an A is [rank, in], a B [out, rank]; slots hold them padded to the largest rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

_BITS = {2: torch.int16, 4: torch.int32}


class UnusableError(Exception):
    """vLLM, or this check, has no place for what an adapter has."""


class MismatchError(Exception):
    """Something holds other tensors than it should."""


@dataclass
class Factors:
    """What a slot should hold for one module of the unadapted model."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


def expected_factors(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    parse: Callable[[str], tuple[str, bool]],
) -> dict[str, Factors]:
    """By module, the tensors of a file in PEFT's format as the kernels should see them.

    `parse`: a tensor's name to its module in vLLM's model, and whether it is the A.
    """
    factors: dict[str, Factors] = {}
    # Those with one scaling (None: the As) together: as many small calls took longer than the work.
    groups: dict[float | None, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        is_a = parse(name)[1]
        scaling = None if is_a else scaling_of(config, name, tensor.shape[1])
        groups.setdefault(scaling, []).append((name, tensor))
    for scaling, group in groups.items():
        # A copy: vLLM gets the originals, and changes them in place.
        values = torch.cat([tensor.flatten() for _, tensor in group]).to(dtype)
        if scaling is not None:
            values *= scaling
        _check_finite(values, group)
        parts = torch.split(values, [tensor.numel() for _, tensor in group])
        for (name, tensor), part in zip(group, parts, strict=True):
            module, is_a = parse(name)
            found = factors.setdefault(module, Factors())
            if is_a:
                found.a = part.view(tensor.shape)
            else:
                found.b = part.view(tensor.shape)
    for module, found in factors.items():
        if found.a is None or found.b is None:
            raise UnusableError(f"{module} has only one of lora_A and lora_B")
    return factors


def _check_finite(values: torch.Tensor, group: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Of logits that are no numbers the first token would be drawn, as if nothing were wrong."""
    # Infinities and NaN have every bit of the exponent; torch's own test takes ten times as long.
    exponent = bits_of(torch.tensor(torch.inf, dtype=values.dtype))
    spoilt = (bits_of(values) & exponent) == exponent
    if not spoilt.any():
        return
    place = int(spoilt.argmax())
    for name, tensor in group:
        if place < tensor.numel():
            raise UnusableError(f"{name} has values that are not finite")
        place -= tensor.numel()


def scaling_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """As PEFT scales A·B of the module of tensor `name`."""
    module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next(
        (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)),
        config["lora_alpha"],
    )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_places(
    modules: Mapping[str, Any], packed: Mapping[str, Sequence[str]], factors: Mapping[str, Factors]
) -> None:
    """Raise UnusableError for the first module of the file that no slot has a place for."""
    places = {part for name in modules for part in packed.get(name, [name])}
    missing = sorted(set(factors) - places)
    if missing:
        raise UnusableError(f"the engine has no slots for {missing[0]}")


def check_slot(
    modules: Mapping[str, Any],
    packed: Mapping[str, Sequence[str]],
    slot: int,
    factors: Mapping[str, Factors],
) -> None:
    """Compare slot `slot` of every module with `factors`, of which each must be held by one.

    `modules`: vLLM's layers with LoRA by name. `packed`: which modules of the unadapted model a
    layer holds side by side, where it holds several.
    """
    left = dict(factors)
    for name, module in modules.items():
        stacks_a, stacks_b = stacks_of(module.lora_a_stacked), stacks_of(module.lora_b_stacked)
        parts = packed.get(name, [name])
        held = [left.pop(part, None) for part in parts]
        if len(parts) != len(stacks_a):
            if any(held):
                raise UnusableError(f"the slots of {name} are of a kind that is not read back")
            held = [None] * len(stacks_a)
        for index, (stack_a, stack_b) in enumerate(zip(stacks_a, stacks_b, strict=True)):
            factor = held[index] or Factors()
            expected = _shard(module, index, factor, stack_a, stack_b)
            if not _holds(stack_a[slot], expected.a) or not _holds(stack_b[slot], expected.b):
                part = parts[index] if len(parts) == len(stacks_a) else name
                raise MismatchError(f"slot {slot} of {part} does not hold the adapter's tensors")
    if left:
        raise MismatchError(f"no slot holds {min(left)}")


def stacks_of(stacked: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """A layer's stacks, one for each part."""
    return (stacked,) if isinstance(stacked, torch.Tensor) else stacked


def _shard(
    module: Any, index: int, factor: Factors, stack_a: torch.Tensor, stack_b: torch.Tensor
) -> Factors:
    """This rank's part of `factor`: of A's columns where the input is split, else of B's rows."""
    if factor.a is None or factor.b is None or module.tp_size == 1:
        return factor
    shard = getattr(module, "output_ids", [module.tp_rank] * (index + 1))[index]
    columns, rows = stack_a.shape[-1], stack_b.shape[-2]
    a, b = factor.a, factor.b
    if a.shape[1] != columns:
        a = a[:, module.tp_rank * columns : (module.tp_rank + 1) * columns]
    if b.shape[0] != rows:
        b = b[shard * rows : (shard + 1) * rows]
    return Factors(a, b)


def _holds(slot: torch.Tensor, expected: torch.Tensor | None) -> bool:
    """Whether the slot is `expected` in its upper left corner and zero elsewhere, in every bit."""
    # numpy looks for zeros three times as fast as torch.
    bits = bits_of(slot)
    if expected is None:
        return not bits.any()
    bits = bits.reshape(bits.shape[-2:])
    rows, columns = expected.shape
    if bits.shape == expected.shape:
        # Bytes are compared in a fraction of the time in which numpy makes an array of booleans.
        return bits.tobytes() == bits_of(expected).tobytes()
    return (
        np.array_equal(bits[:rows, :columns], bits_of(expected))
        and not bits[rows:].any()
        and not bits[:, columns:].any()
    )


def bits_of(values: torch.Tensor) -> NDArray[Any]:
    """The same memory as integers, where it is not on another device."""
    return values.cpu().view(_BITS[values.element_size()]).numpy()

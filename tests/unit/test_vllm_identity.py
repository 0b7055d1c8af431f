"""What is read back from vLLM's slots, compared with an adapter's file."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from services.sampler.backends.vllm_identity import (
    Factors,
    MismatchError,
    UnusableError,
    check_places,
    check_slot,
    expected_factors,
)

WIDTH, RANK, MAX_RANK, SLOTS = 12, 3, 8, 2
OUT = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 12}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
PREFIX = "base_model.model."


def parse(name: str) -> tuple[str, bool]:
    module, factor, _ = name.removeprefix(PREFIX).rsplit(".", 2)
    return module, factor == "lora_A"


def file_of(*modules: str, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=rng)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(OUT[module], RANK, generator=rng)
    return tensors


def layer(parts: list[str], dtype=torch.float32, *, rank=0, size=1, split_input=False):
    """A layer with empty slots, as rank `rank` of `size` has it."""
    width = WIDTH // size if split_input else WIDTH
    rows = [OUT[part] if split_input else OUT[part] // size for part in parts]
    return SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(SLOTS, 1, MAX_RANK, width, dtype=dtype) for _ in parts),
        lora_b_stacked=tuple(torch.zeros(SLOTS, 1, row, MAX_RANK, dtype=dtype) for row in rows),
        tp_size=size,
        tp_rank=rank,
        output_ids=(rank,) * len(parts),
    )


def fill(module, index: int, slot: int, a: torch.Tensor, b: torch.Tensor) -> None:
    """As vLLM's layers do it."""
    module.lora_a_stacked[index][slot, 0, : a.shape[0], : a.shape[1]].copy_(a)
    module.lora_b_stacked[index][slot, 0, : b.shape[0], : b.shape[1]].copy_(b)


def config(**changes):
    return {"r": RANK, "lora_alpha": 7, **changes}


def loaded(dtype=torch.float32, names=("q_proj", "v_proj", "o_proj")):
    """Layers whose slot 1 holds a file of `names`, and what it should hold."""
    tensors = file_of(*names)
    modules = {"qkv_proj": layer(PACKED["qkv_proj"], dtype), "o_proj": layer(["o_proj"], dtype)}
    for module, parts in (("qkv_proj", PACKED["qkv_proj"]), ("o_proj", ["o_proj"])):
        for index, part in enumerate(parts):
            if part in names:
                b = tensors[f"{PREFIX}{part}.lora_B.weight"].to(dtype)
                b *= 7 / RANK
                fill(modules[module], index, 1, tensors[f"{PREFIX}{part}.lora_A.weight"], b)
    return modules, expected_factors(file_of(*names), config(), dtype, parse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slot_that_holds_the_file_is_accepted(dtype):
    modules, factors = loaded(dtype)
    check_slot(modules, PACKED, 1, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stack", ["lora_a_stacked", "lora_b_stacked"])
@pytest.mark.parametrize(
    ("layer_name", "index", "where"),
    [
        pytest.param("qkv_proj", 0, (0, 0), id="a weight"),
        pytest.param("qkv_proj", 0, (-1, -1), id="padding"),
        pytest.param("qkv_proj", 1, (0, 0), id="a part that the adapter leaves alone"),
        pytest.param("o_proj", 0, (2, 1), id="a layer of one part"),
    ],
)
def test_one_other_bit_anywhere_in_the_slot_is_seen(dtype, stack, layer_name, index, where):
    modules, factors = loaded(dtype)
    bits = getattr(modules[layer_name], stack)[index][1, 0].view(
        torch.int32 if dtype is torch.float32 else torch.int16
    )
    bits[where] ^= 1
    with pytest.raises(MismatchError, match="slot 1 of"):
        check_slot(modules, PACKED, 1, factors)


@pytest.mark.parametrize("slot", [0, 1])
def test_an_empty_slot_is_not_the_adapter_and_a_full_one_is_not_nothing(slot):
    modules, factors = loaded()
    with pytest.raises(MismatchError):
        check_slot(modules, PACKED, slot, factors if slot == 0 else {})


def test_another_files_tensors_are_seen():
    modules, _ = loaded()
    other = expected_factors(
        file_of("q_proj", "v_proj", "o_proj", seed=1), config(), torch.float32, parse
    )
    with pytest.raises(MismatchError):
        check_slot(modules, PACKED, 1, other)


@pytest.mark.parametrize("name", ["v_proj", "o_proj"])
def test_a_module_that_was_left_out_is_seen(name):
    modules, factors = loaded()
    held = modules["o_proj" if name == "o_proj" else "qkv_proj"]
    for stack in (held.lora_a_stacked[-1], held.lora_b_stacked[-1]):
        stack[1] = 0
    with pytest.raises(MismatchError, match=name):
        check_slot(modules, PACKED, 1, factors)


def test_a_module_that_has_no_slots_is_refused_before_and_seen_after():
    modules, factors = loaded()
    stray = {**factors, "down_proj": Factors(torch.ones(RANK, WIDTH), torch.ones(WIDTH, RANK))}
    with pytest.raises(UnusableError, match="down_proj"):
        check_places(modules, PACKED, stray)
    with pytest.raises(MismatchError, match="down_proj"):
        check_slot(modules, PACKED, 1, stray)


def test_half_an_adapter_is_refused():
    tensors = file_of("q_proj")
    del tensors[f"{PREFIX}q_proj.lora_B.weight"]
    with pytest.raises(UnusableError, match="q_proj"):
        expected_factors(tensors, config(), torch.float32, parse)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, 7 / RANK),
        ({"use_rslora": True}, 7 / RANK**0.5),
        ({"alpha_pattern": {"q_proj": 2}}, 2 / RANK),
        ({"alpha_pattern": {"proj": 2}}, 7 / RANK),
    ],
)
def test_the_scaling_is_pefts(changes, scaling):
    tensors = file_of("q_proj")
    factors = expected_factors(tensors, config(**changes), torch.float32, parse)
    b = tensors[f"{PREFIX}q_proj.lora_B.weight"]
    assert torch.equal(factors["q_proj"].b, b * scaling)


def test_what_is_expected_does_not_change_when_vllm_scales_the_files_tensors_in_place():
    tensors = file_of("q_proj")
    factors = expected_factors(tensors, config(), torch.float32, parse)
    before = factors["q_proj"].a.clone(), factors["q_proj"].b.clone()
    for tensor in tensors.values():
        tensor.mul_(2)
    assert torch.equal(factors["q_proj"].a, before[0])
    assert torch.equal(factors["q_proj"].b, before[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_holds_its_own_part(rank):
    tensors = file_of("q_proj", "k_proj", "v_proj", "o_proj")
    factors = expected_factors(tensors, config(), torch.float32, parse)
    qkv = layer(PACKED["qkv_proj"], rank=rank, size=2)
    # Both ranks share the one head of keys and values, as where there are fewer than ranks.
    qkv.output_ids = (rank, 0, 0)
    o_proj = layer(["o_proj"], rank=rank, size=2, split_input=True)
    for index, part in enumerate(PACKED["qkv_proj"]):
        rows = OUT[part] // 2
        start = qkv.output_ids[index] * rows
        fill(qkv, index, 0, factors[part].a, factors[part].b[start : start + rows])
    half = slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2)
    fill(o_proj, 0, 0, factors["o_proj"].a[:, half], factors["o_proj"].b)
    modules = {"qkv_proj": qkv, "o_proj": o_proj}
    check_slot(modules, PACKED, 0, factors)
    o_proj.tp_rank = 1 - rank
    with pytest.raises(MismatchError, match="o_proj"):
        check_slot(modules, PACKED, 0, factors)


def test_slots_of_a_kind_that_cannot_be_read_back_are_refused_only_where_they_are_used():
    modules, factors = loaded()
    packed = {**PACKED, "o_proj": ["o_proj", "other"]}
    with pytest.raises(UnusableError, match="o_proj"):
        check_slot(modules, packed, 1, factors)
    modules, factors = loaded(names=("q_proj",))
    check_slot(modules, packed, 1, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_several_scalings_and_types_are_each_what_they_are_alone(dtype):
    tensors = file_of(*OUT)
    name = f"{PREFIX}k_proj.lora_B.weight"
    tensors[name] = tensors[name].half()
    changes = config(alpha_pattern={"q_proj": 2, "v_proj": 5})
    factors = expected_factors(tensors, changes, dtype, parse)
    for module, alpha in {"q_proj": 2, "k_proj": 7, "v_proj": 5, "o_proj": 7}.items():
        a, b = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"] for factor in "AB")
        assert torch.equal(factors[module].a, a.to(dtype))
        assert torch.equal(factors[module].b, b.to(dtype) * (alpha / RANK))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_the_tensor_that_is_not_finite_is_named_among_others(value):
    tensors = file_of(*OUT)
    spoilt = f"{PREFIX}v_proj.lora_B.weight"
    tensors[spoilt][1, 2] = value  # the last one is finite before it is rounded
    with pytest.raises(UnusableError, match=f"{spoilt} has values"):
        expected_factors(tensors, config(), torch.bfloat16, parse)

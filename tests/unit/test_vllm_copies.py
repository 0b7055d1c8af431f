"""Loading by copying: the same bits as vLLM's own packing, each of them read back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

pytest.importorskip("vllm")

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper

from services.sampler.backends import vllm_copies
from services.sampler.backends.vllm_copies import Copies, Stacks
from services.sampler.backends.vllm_identity import MismatchError
from services.sampler.backends.vllm_ways import header_of

WIDTH, MAX_RANK, SLOTS = 12, 8, 3
OUT = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 12}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
PREFIX = "base_model.model."
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Layer:
    """vLLM's layer for parts that lie side by side, as far as its slots go."""

    tp_size, tp_rank = 1, 0
    reset_lora = BaseLinearLayerWithLoRA.reset_lora
    set_lora = MergedColumnParallelLinearWithLoRA.set_lora

    def __init__(self, parts, dtype) -> None:
        self.n_slices = len(parts)
        self.lora_a_stacked = tuple(
            torch.zeros(SLOTS, 1, MAX_RANK, WIDTH, dtype=dtype) for _ in parts
        )
        self.lora_b_stacked = tuple(
            torch.zeros(SLOTS, 1, OUT[part], MAX_RANK, dtype=dtype) for part in parts
        )


def parse(name: str) -> tuple[str, bool]:
    module, factor, _ = name.removeprefix(PREFIX).rsplit(".", 2)
    return module, factor == "lora_A"


class World:
    """Layers, what is loaded into them by vLLM, and what by copying."""

    def __init__(self, dtype=torch.float32, rank=3, names=tuple(OUT), **config) -> None:
        self.dtype, self.rank, self.names = dtype, rank, names
        self.config = {"r": rank, "lora_alpha": 7, "target_modules": [*names], **config}
        self.modules = {
            "qkv_proj": Layer(PACKED["qkv_proj"], dtype),
            "o_proj": Layer(["o_proj"], dtype),
        }
        self.told: list[tuple] = []
        self.copies = Copies(
            self.modules,
            PACKED,
            dtype,
            parse,
            lambda stacks, slot, rank: self.told.append((len(stacks), slot, rank)),
        )

    def file(self, seed=0, dtype=torch.float32, spoil=None):
        rng = torch.Generator().manual_seed(seed)
        tensors = {}
        for name in self.names:
            for half, shape in (("A", (self.rank, WIDTH)), ("B", (OUT[name], self.rank))):
                tensor = torch.randn(shape, generator=rng).to(dtype)
                tensors[f"{PREFIX}{name}.lora_{half}.weight"] = tensor
        if spoil is not None:
            spoil(tensors)
        return np.frombuffer(bytearray(safetensors.torch.save(tensors)), np.uint8)

    def by_vllm(self, file, slot: int) -> None:
        tensors = safetensors.torch.load(file.tobytes())
        helper = PEFTHelper.from_dict(self.config)
        adapter = LoRAModel.from_lora_tensors(1, tensors, helper, device="cpu", dtype=self.dtype)
        for name, module in self.modules.items():
            parts = [adapter.loras.get(part) for part in PACKED.get(name, [name])]
            module.reset_lora(slot)
            if any(parts):
                packed = PackedLoRALayerWeights.pack(parts)
                module.set_lora(slot, packed.lora_a, packed.lora_b)

    def kind(self, file):
        return header_of(file), json.dumps(self.config)

    def learn(self, file):
        """The way that is known once vLLM has loaded `file`."""
        self.by_vllm(file, 0)
        self.copies.learn(self.kind(file), file, 0)
        return self.copies.find(self.kind(file))

    def stacks(self):
        return [
            stack
            for module in self.modules.values()
            for stack in (*module.lora_a_stacked, *module.lora_b_stacked)
        ]

    def fill(self, value) -> None:
        for stack in self.stacks():
            stack.fill_(value)


CONFIGS = {
    "one scaling": {},
    "several scalings": {"alpha_pattern": {"k_proj": 2, "o_proj": 5}},
    "rslora": {"use_rslora": True},
    "scaled by 1": {"lora_alpha": 3},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("names", [tuple(OUT), ("q_proj", "v_proj"), ("o_proj",)])
@pytest.mark.parametrize("rank", [1, 3, MAX_RANK])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_slot_has_the_bits_of_vllms_own_packing(dtype, rank, names, config):
    for stored in DTYPES:
        world = World(dtype, rank, names, **config)
        way = world.learn(world.file(1, stored))
        assert way is not None
        file = world.file(2, stored)
        world.fill(5)
        world.by_vllm(file, 0)
        world.copies.put(way, 2, way.flat_of(file))
        for stack in world.stacks():
            assert stack[2].view(torch.uint8).equal(stack[0].view(torch.uint8))
            assert (stack[1] == 5).all()


def test_beyond_the_rank_and_the_modules_of_a_file_there_are_zeros():
    world = World(rank=3, names=("q_proj",))
    way = world.learn(world.file(1))
    world.fill(5)
    world.copies.put(way, 1, way.flat_of(world.file(2)))
    qkv, o_proj = world.modules.values()
    for index, (a, b) in enumerate(zip(qkv.lora_a_stacked, qkv.lora_b_stacked, strict=True)):
        rank = 0 if index else 3
        assert a[1, 0, :rank].all()
        assert b[1, 0, :, :rank].all()
        assert not a[1, 0, rank:].any()
        assert not b[1, 0, :, rank:].any()
    assert not o_proj.lora_a_stacked[0][1].any()
    assert not o_proj.lora_b_stacked[0][1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, MAX_RANK])
def test_every_single_bit_that_changes_in_the_slot_after_the_copy_is_seen(monkeypatch, dtype, rank):
    world = World(dtype, rank, names=("q_proj", "v_proj", "o_proj"))
    way = world.learn(world.file(1))
    flat = way.flat_of(world.file(2))
    write = Stacks.write

    def spoilt(stack, value, bit):
        def write_and_spoil(self, slot, flat):
            write(self, slot, flat)
            stack[slot].view(torch.uint8).view(-1)[value] ^= 1 << bit

        return write_and_spoil

    for stack in world.stacks():
        num_bytes = stack[1].numel() * stack.element_size()
        for value in range(num_bytes):
            with monkeypatch.context() as patch:
                patch.setattr(Stacks, "write", spoilt(stack, value, value % 8))
                with pytest.raises(MismatchError, match="slot 1 does not hold"):
                    world.copies.put(way, 1, flat)
    world.copies.put(way, 1, flat)


@pytest.mark.parametrize("stack", range(8))
def test_a_stack_that_is_not_written_is_seen(monkeypatch, stack):
    world = World()
    way = world.learn(world.file(1))
    write = Stacks.write

    def leave_out(self, slot, flat):
        left_out = world.stacks()[stack][slot].clone()
        write(self, slot, flat)
        world.stacks()[stack][slot] = left_out

    monkeypatch.setattr(Stacks, "write", leave_out)
    with pytest.raises(MismatchError):
        world.copies.put(way, 1, way.flat_of(world.file(2)))


def test_a_way_is_for_one_header_and_one_configuration():
    world = World()
    header, config = world.kind(world.file(1))
    assert world.learn(world.file(1)) is not None
    assert world.copies.find((header, config)) is not None
    assert world.copies.find((header + b" ", config)) is None
    assert world.copies.find((header, config + " ")) is None


def fresh(tensors):
    """As PEFT makes them."""
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.zero_()


def two_are_equal(tensors):
    q, k = (f"{PREFIX}{name}.lora_A.weight" for name in ("q_proj", "k_proj"))
    tensors[q] = tensors[k].clone()


def one_is_of_another_type(tensors):
    name = f"{PREFIX}k_proj.lora_A.weight"
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize("spoil", [fresh, two_are_equal, one_is_of_another_type])
def test_nothing_is_learnt_from_a_file_that_does_not_tell_the_way(spoil):
    world = World()
    assert world.learn(world.file(1, spoil=spoil)) is None


def test_a_way_that_does_not_lead_to_what_vllm_put_there_is_not_taken(monkeypatch):
    monkeypatch.setattr("services.sampler.backends.vllm_ways.scaling_of", lambda *_: 1.0)
    world = World()
    assert world.learn(world.file(1)) is None


def test_there_is_no_way_where_a_stack_holds_only_a_part_of_a_tensor():
    world = World()
    world.by_vllm(world.file(1), 0)
    o_proj = world.modules["o_proj"]
    o_proj.lora_a_stacked = (o_proj.lora_a_stacked[0][..., : WIDTH // 2].contiguous(),)
    assert world.copies.find(world.kind(world.file(1))) is None
    world.copies.learn(world.kind(world.file(1)), world.file(1), 0)
    assert world.copies.find(world.kind(world.file(1))) is None


def test_stacks_that_were_replaced_are_not_written_to_in_vain():
    world = World()
    assert world.learn(world.file(1)) is not None
    o_proj = world.modules["o_proj"]
    o_proj.lora_b_stacked = tuple(stack.clone() for stack in o_proj.lora_b_stacked)
    assert world.copies.find(world.kind(world.file(1))) is None
    way = world.learn(world.file(1))
    world.copies.put(way, 1, way.flat_of(world.file(2)))
    assert o_proj.lora_b_stacked[0][1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_values_that_are_not_finite_in_the_slot_are_seen(dtype, value):
    def spoil(tensors):
        tensors[f"{PREFIX}v_proj.lora_B.weight"][3, 2] = value

    world = World(dtype)
    way = world.learn(world.file(1))
    assert way.flat_of(world.file(2)) is not None
    assert way.flat_of(world.file(2, spoil=spoil)) is None


def test_ranks_are_told_where_they_are_certain():
    world = World(rank=3, names=("q_proj",))
    way = world.learn(world.file(1))
    world.copies.put(way, 1, way.flat_of(world.file(2)))
    assert world.told == [(3, 1, 3), (1, 1, 0)]
    world.told.clear()

    def shorten(tensors):
        tensors[f"{PREFIX}q_proj.lora_A.weight"][2] = 0

    world.copies.put(way, 1, way.flat_of(world.file(3, spoil=shorten)))
    assert world.told == []


def test_ways_are_bounded_and_the_least_recently_used_one_goes(monkeypatch):
    monkeypatch.setattr(vllm_copies, "_MAX_WAYS", 2)
    world = World()
    kinds = []
    for alpha in (1, 2, 3):
        world.config["lora_alpha"] = alpha
        assert world.learn(world.file(alpha)) is not None
        kinds.append(world.kind(world.file(alpha)))
        world.copies.find(kinds[0])
    assert [world.copies.find(kind) is not None for kind in kinds] == [True, False, True]

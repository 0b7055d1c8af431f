"""What the worker knows of its slots, and when it knows it no longer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

pytest.importorskip("vllm")

from rollmesh.digest import safetensors_digest
from services.sampler.backends import vllm_slots
from services.sampler.backends.vllm_identity import MismatchError, UnusableError
from services.sampler.backends.vllm_provenance import IdentityError
from services.sampler.backends.vllm_slots import VerifiedSlots

NAME = "model.layers.0.mlp.down_proj"
SLOTS, WIDTH, RANK, MAX_RANK = 2, 6, 2, 4


class Layer:
    """One of vLLM's layers with LoRA."""

    tp_size, tp_rank = 1, 0

    def __init__(self) -> None:
        self.lora_a_stacked = (torch.zeros(SLOTS, 1, MAX_RANK, WIDTH),)
        self.lora_b_stacked = (torch.zeros(SLOTS, 1, WIDTH, MAX_RANK),)

    def reset_lora(self, index: int) -> None:
        self.lora_a_stacked[0][index] = 0
        self.lora_b_stacked[0][index] = 0

    def set_lora(self, index: int, a: torch.Tensor, b: torch.Tensor) -> None:
        self.reset_lora(index)
        self.lora_a_stacked[0][index, 0, : a.shape[0]] = a
        self.lora_b_stacked[0][index, 0, :, : b.shape[1]] = b


class Manager:
    """vLLM's, for one layer."""

    def __init__(self) -> None:
        self.modules = {NAME: Layer()}
        self.packed_modules: dict[str, list[str]] = {}
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self.model = SimpleNamespace()
        self.known: dict = {}
        self.wrapper = SimpleNamespace(token_lora_indices=torch.tensor([0, -1, 1]))
        self.punica_wrapper_mapping = {"model": self.wrapper}

    def add_adapter(self, adapter) -> bool:
        for factors in adapter.loras.values():
            factors.optimize()
        self.known.setdefault(adapter.id, adapter)
        return True

    def activate_adapter(self, number: int) -> bool:
        if number in self.lora_index_to_id:
            return False
        slot = self.lora_index_to_id.index(None)
        self.lora_index_to_id[slot] = number
        factors = self.known[number].loras[NAME]
        self.modules[NAME].set_lora(slot, factors.lora_a, factors.lora_b)
        return True

    def remove_adapter(self, number: int) -> bool:
        self.known.pop(number, None)
        slots = self.lora_index_to_id
        self.lora_index_to_id = [None if held == number else held for held in slots]
        return True


@pytest.fixture
def manager():
    return Manager()


@pytest.fixture
def slots(manager):
    from vllm.lora.lora_model import LoRAModel  # noqa: PLC0415

    config = SimpleNamespace(lora_dtype=torch.float32, max_lora_rank=MAX_RANK)
    worker = SimpleNamespace(
        _adapter_manager=manager, lora_config=config, vocab_size=50, _lora_model_cls=LoRAModel
    )
    return VerifiedSlots(worker)


@pytest.fixture
def written(tmp_path):
    """Writes an adapter's folder; returns it, the digest, and the configuration."""

    def write(seed: int, module: str = NAME, rank: int = RANK, spoil=None):
        rng = torch.Generator().manual_seed(seed)
        file = safetensors.torch.save(
            {
                f"base_model.model.{module}.lora_A.weight": torch.randn(rank, WIDTH, generator=rng),
                f"base_model.model.{module}.lora_B.weight": torch.randn(WIDTH, rank, generator=rng),
            }
        )
        if spoil is not None:
            tensors = safetensors.torch.load(file)
            spoil(tensors)
            file = safetensors.torch.save(tensors)
        folder = tmp_path / str(seed)
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(file)
        config = {"r": rank, "lora_alpha": 3, "target_modules": ["down_proj"]}
        return folder, safetensors_digest(file), json.dumps(config)

    return write


def test_a_slot_is_known_once_it_was_read_back(slots, written):
    folder, digest, config = written(1)
    with pytest.raises(IdentityError):
        slots.slot_of(7, digest)
    slots.load(7, folder, digest, config)
    assert slots.slot_of(7, digest) == 0
    assert slots.slot_of(0, "") == -1
    for number, other in ((8, digest), (7, "0" * 64), (7, "")):
        with pytest.raises(IdentityError):
            slots.slot_of(number, other)


@pytest.mark.parametrize("write", ["set_lora", "reset_lora"])
def test_whatever_writes_to_a_slot_ends_what_is_known_of_it(slots, manager, written, write):
    for number in (7, 8):
        slots.load(number, *written(number))
    changes = slots.changes
    factors = (torch.ones(RANK, WIDTH), torch.ones(WIDTH, RANK)) if write == "set_lora" else ()
    getattr(manager.modules[NAME], write)(1, *factors)
    assert slots.changes > changes
    with pytest.raises(IdentityError, match="adapter 8"):
        slots.slot_of(8, written(8)[1])
    assert slots.slot_of(7, written(7)[1]) == 0


def test_what_vllm_loads_by_itself_is_not_known(slots, manager, written):
    """It reads a folder that a request names, if it does not know the number."""
    _, digest, _ = written(1)
    slots.load(7, *written(1))
    adapter = manager.known[7]
    slots.unload(7)
    manager.known[7] = adapter
    manager.activate_adapter(7)
    with pytest.raises(IdentityError):
        slots.slot_of(7, digest)


def test_an_adapter_that_moved_to_another_slot_is_not_known(slots, manager, written):
    slots.load(7, *written(1))
    manager.lora_index_to_id = [None, 7]
    with pytest.raises(IdentityError):
        slots.slot_of(7, written(1)[1])


def test_a_file_with_another_digest_touches_no_slot(slots, manager, written):
    folder, digest, config = written(1)
    with pytest.raises(MismatchError, match=digest):
        slots.load(7, folder, "0" * 64, config)
    assert manager.lora_index_to_id == [None, None]


def test_a_number_that_vllm_knows_keeps_no_old_weights(slots, written):
    slots.load(7, *written(1))
    with pytest.raises(MismatchError):
        slots.load(7, *written(2))


@pytest.mark.parametrize(
    ("module", "rank", "told"),
    [
        ("model.layers.9.mlp.down_proj", RANK, "no slots for model.layers.9"),
        ("model.embed_tokens", RANK, "embeddings"),
        ("lm_head", RANK, "embeddings"),
        (NAME, MAX_RANK + 1, "greater than max_lora_rank"),
    ],
)
def test_what_vllm_has_no_place_for_is_refused(slots, written, module, rank, told):
    with pytest.raises(UnusableError, match=told):
        slots.load(7, *written(1, module, rank))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, garble, delete])
def test_a_file_that_was_damaged_is_not_the_one_that_was_pulled(slots, manager, written, damage):
    folder, digest, config = written(1)
    damage(folder / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="cannot be read"):
        slots.load(7, folder, digest, config)
    assert manager.lora_index_to_id == [None, None]


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"r": 2, "target_modules": ["down_proj"], "lora_alpha": "x"}',
        '{"r": 2, "target_modules": ["down_proj"], "lora_alpha": null}',
        '{"r": 2, "target_modules": ["down_proj"], "lora_alpha": 3, "alpha_pattern": {"(": 1}}',
        '{"r": 2, "target_modules": ["down_proj"], "lora_alpha": 3, "use_dora": true}',
    ],
)
def test_a_configuration_that_vllm_cannot_use_is_refused(slots, manager, written, config):
    folder, digest, _ = written(1)
    with pytest.raises(UnusableError):
        slots.load(7, folder, digest, config)
    assert manager.lora_index_to_id == [None, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(slots, manager, written, value):
    def diverge(tensors):
        tensors[f"base_model.model.{NAME}.lora_B.weight"][0, 0] = value

    with pytest.raises(UnusableError, match=r"lora_B.weight has values that are not finite"):
        slots.load(7, *written(1, spoil=diverge))
    assert manager.lora_index_to_id == [None, None]


def test_whatever_fails_after_a_slot_was_taken_frees_it(slots, manager, written, monkeypatch):
    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(vllm_slots, "check_slot", fail)
        with pytest.raises(MemoryError):
            slots.load(7, *written(1))
    assert manager.lora_index_to_id == [None, None]
    assert not manager.known
    slots.load(8, *written(2))


def test_no_adapter_is_thrown_out_for_another(slots, manager, written):
    for number in (7, 8):
        slots.load(number, *written(number))
    with pytest.raises(UnusableError, match="taken"):
        slots.load(9, *written(9))
    assert manager.lora_index_to_id == [7, 8]


def test_slots_of_tokens_are_the_kernels(slots, manager):
    assert slots.used_by_tokens().tolist() == [0, -1, 1]
    # Where they are on another device, what they were made of counts.
    manager.lora_index_to_id = [5, 3]
    manager._last_mapping = SimpleNamespace(index_mapping=(3, 0, 5, 5))
    manager.wrapper.token_lora_indices = torch.empty(4, device="meta")
    assert slots.used_by_tokens().tolist() == [1, -1, 0, 0]

"""What the worker knows of its slots, and when it knows it no longer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

pytest.importorskip("vllm")

from vllm.lora.lora_model import LoRAModel

from rollmesh.digest import safetensors_digest
from services.sampler.backends import vllm_slots
from services.sampler.backends.vllm_copies import Stacks
from services.sampler.backends.vllm_identity import MismatchError, UnusableError
from services.sampler.backends.vllm_lora import SlotwiseLora
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

    def __init__(self, kernels) -> None:
        self.modules = {NAME: Layer()}
        self.packed_modules: dict[str, list[str]] = {}
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self.model = SimpleNamespace()
        self.known = self._registered_adapters = {}
        self._active_adapters: dict[int, None] = {}
        self.wrapper = kernels
        self.punica_wrapper_mapping = {"model": self.wrapper}

    def list_adapters(self) -> dict:
        return self.known

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
    """Of a GPU."""
    return Manager(SimpleNamespace(token_lora_indices=torch.tensor([0, -1, 1])))


@pytest.fixture
def copying():
    """Of a CPU, where what is loaded once shows how the next ones are copied."""
    return Manager(SlotwiseLora(16, 4, "cpu", max_loras=SLOTS))


def slots_of(manager) -> VerifiedSlots:
    config = SimpleNamespace(lora_dtype=torch.float32, max_lora_rank=MAX_RANK)
    worker = SimpleNamespace(
        _adapter_manager=manager, lora_config=config, vocab_size=50, _lora_model_cls=LoRAModel
    )
    return VerifiedSlots(worker)


@pytest.fixture
def slots(manager):
    return slots_of(manager)


@pytest.fixture
def copying_slots(copying, written):
    """A file like those of `written` has been here."""
    slots = slots_of(copying)
    slots.load(1, *written(1))
    slots.unload(1)
    return slots


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


def never(*_):
    raise AssertionError


def holds(manager, slot, folder) -> bool:
    tensors = safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
    layer = manager.modules[NAME]
    a, b = (tensors[f"base_model.model.{NAME}.lora_{half}.weight"] for half in "AB")
    scaled = b * (3 / RANK)
    return (
        layer.lora_a_stacked[0][slot, 0, :RANK].equal(a)
        and layer.lora_b_stacked[0][slot, 0, :, :RANK].equal(scaled)
        and not layer.lora_a_stacked[0][slot, 0, RANK:].any()
        and not layer.lora_b_stacked[0][slot, 0, :, RANK:].any()
    )


def test_the_next_file_of_a_kind_is_copied_and_read_back(copying, copying_slots, written):
    copying.activate_adapter = never
    for number in (7, 8):
        folder, digest, config = written(number)
        changes = copying_slots.changes
        copying_slots.load(number, folder, digest, config)
        assert copying_slots.changes > changes
        slot = copying_slots.slot_of(number, digest)
        assert copying.lora_index_to_id[slot] == number
        assert holds(copying, slot, folder)
    assert set(copying.known) == set(copying._active_adapters) == {7, 8}


def test_a_file_of_another_kind_is_loaded_by_vllm(copying, copying_slots, written):
    folder, digest, config = written(7)
    copying.activate_adapter = never
    with pytest.raises(UnusableError):
        copying_slots.load(7, folder, digest, config.replace("3", "5"))
    with pytest.raises(UnusableError):
        copying_slots.load(7, *written(7, rank=RANK + 1))
    copying_slots.load(7, *written(7))


@pytest.mark.parametrize("write", ["set_lora", "reset_lora"])
def test_whatever_writes_to_a_copied_slot_ends_what_is_known_of_it(
    copying, copying_slots, written, write
):
    copying_slots.load(7, *written(7))
    factors = (torch.ones(RANK, WIDTH), torch.ones(WIDTH, RANK)) if write == "set_lora" else ()
    getattr(copying.modules[NAME], write)(0, *factors)
    with pytest.raises(IdentityError):
        copying_slots.slot_of(7, written(7)[1])


def test_a_copy_into_a_slot_ends_what_was_known_of_it(copying, copying_slots, written):
    copying_slots.load(7, *written(7))
    copying.lora_index_to_id = [None, 7]  # it moves
    copying_slots.load(8, *written(8))
    copying.lora_index_to_id = [7, 8]
    with pytest.raises(IdentityError):
        copying_slots.slot_of(7, written(7)[1])


def test_a_copy_that_did_not_arrive_is_not_known_and_its_slot_is_free(
    monkeypatch, copying, copying_slots, written
):
    with monkeypatch.context() as patch:
        patch.setattr(Stacks, "write", lambda *_: None)
        with pytest.raises(MismatchError, match="does not hold"):
            copying_slots.load(7, *written(7))
    assert copying.lora_index_to_id == [None, None]
    assert not copying.known
    copying_slots.load(8, *written(8))
    assert holds(copying, 0, written(8)[0])


def test_a_known_kind_excuses_nothing(copying, copying_slots, written):
    folder, digest, config = written(7)
    with pytest.raises(MismatchError, match=digest):
        copying_slots.load(7, folder, "0" * 64, config)

    def diverge(tensors):
        tensors[f"base_model.model.{NAME}.lora_B.weight"][0, 0] = float("nan")

    with pytest.raises(UnusableError, match=r"lora_B.weight has values that are not finite"):
        copying_slots.load(7, *written(7, spoil=diverge))
    for number in (7, 8):
        copying_slots.load(number, *written(number))
    with pytest.raises(UnusableError, match="taken"):
        copying_slots.load(9, *written(9))
    with pytest.raises(MismatchError):  # it has the number of one that is there
        copying_slots.load(8, *written(9))
    assert copying.lora_index_to_id == [7, None]

"""Which LoRA slots of vLLM's hold which adapter, known from reading them back."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name

from rollmesh.digest import safetensors_digest
from services.sampler.backends.vllm_copies import Copies
from services.sampler.backends.vllm_identity import (
    MismatchError,
    UnusableError,
    check_places,
    check_slot,
    expected_factors,
)
from services.sampler.backends.vllm_lora import SlotwiseLora
from services.sampler.backends.vllm_provenance import IdentityError
from services.sampler.backends.vllm_ways import header_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


_MAX_NAMES = 8192
"""Names of tensors whose place in the model is remembered."""


class VerifiedSlots:
    """The slots of a worker: `slot → number and digest` of what was read back from there.

    Whatever writes to a slot ends what is known of it; only `load` begins it again.

    Attributes:
        changes: counts up whenever a slot is written to or verified.
    """

    def __init__(self, worker_manager: Any) -> None:
        self._worker = worker_manager
        self._manager = worker_manager._adapter_manager  # noqa: SLF001 - vLLM has no public name
        self._verified: dict[int, tuple[int, str]] = {}
        # The names in one adapter's file are those in the next one's.
        self._parsed = lru_cache(_MAX_NAMES)(self._parse)
        self.changes = 0
        kernels = next(iter(self._manager.punica_wrapper_mapping.values()))
        self._copies = (
            Copies(
                self._manager.modules,
                self._manager.packed_modules,
                self._worker.lora_config.lora_dtype,
                self._parsed,
                kernels.wrote,
            )
            if isinstance(kernels, SlotwiseLora)
            else None
        )
        for module in self._manager.modules.values():
            for name in ("set_lora", "reset_lora"):
                setattr(module, name, self._announced(getattr(module, name)))

    def _announced(self, write: Callable[..., None]) -> Callable[..., None]:
        """A module's method that writes to a slot, after which nothing is known of the slot."""

        def announced(index: int, *args: Any, **kwargs: Any) -> None:
            self._note_write(index)
            write(index, *args, **kwargs)

        return announced

    def _note_write(self, slot: int) -> None:
        self._verified.pop(slot, None)
        self.changes += 1

    def load(self, number: int, folder: Path, digest: str, config_json: str) -> None:
        """Put an adapter into a free slot and read it back from there; a failure frees the slot.

        Raises:
            UnusableError: vLLM cannot use it.
            MismatchError: the file does not have this digest, or the slot holds something else.
        """
        file = _read(folder / "adapter_model.safetensors", digest)
        slots = self._manager.lora_index_to_id
        if None not in slots and number not in slots:
            raise UnusableError("all slots are taken")
        try:
            slot = self._load(number, file, config_json)
        except BaseException:
            self.unload(number)
            raise
        self._verified[slot] = (number, digest)
        self.changes += 1

    def _load(self, number: int, file: NDArray[np.uint8], config_json: str) -> int:
        """Into which slot."""
        if self._copies is None:
            return self._load_as_vllm(number, file, config_json)
        kind = header_of(file), config_json
        way = self._copies.find(kind)
        flat = None if way is None else way.flat_of(file)
        if way is None or flat is None or number in self._manager.list_adapters():
            slot = self._load_as_vllm(number, file, config_json)
            self._copies.learn(kind, file, slot)
            return slot
        slot = self._take_slot(number, max(way.ranks))
        self._copies.put(way, slot, flat)
        return slot

    def _load_as_vllm(self, number: int, file: NDArray[np.uint8], config_json: str) -> int:
        """By vLLM's own code; what the slot should hold is found without it."""
        manager, dtype = self._manager, self._worker.lora_config.lora_dtype
        tensors: dict[str, Any] = load(file.tobytes())
        try:
            config = json.loads(config_json)
            factors = expected_factors(tensors, config, dtype, self._parsed)
        except (ValueError, TypeError, LookupError, AttributeError, re.error) as error:
            raise UnusableError(f"adapter_config.json is not PEFT's: {error!r}") from error
        check_places(manager.modules, manager.packed_modules, factors)
        self._register(number, tensors, config)
        slot: int = manager.lora_index_to_id.index(number)
        check_slot(manager.modules, manager.packed_modules, slot, factors)
        return slot

    def _take_slot(self, number: int, rank: int) -> int:
        """Have vLLM believe that it loaded an adapter, which is to be put into the slot."""
        manager = self._manager
        slot: int = manager.lora_index_to_id.index(None)
        manager._registered_adapters[number] = LoRAModel(number, rank, {})  # noqa: SLF001
        manager._active_adapters[number] = None  # noqa: SLF001
        manager.lora_index_to_id[slot] = number
        self._note_write(slot)
        return slot

    def _register(self, number: int, tensors: dict[str, Any], config: dict[str, Any]) -> None:
        """Give the tensors to vLLM's own manager, as its own loading does after reading them."""
        worker = self._worker
        try:
            helper = PEFTHelper.from_dict(config)
            helper.validate_legal(worker.lora_config)
            adapter = worker._lora_model_cls.from_lora_tensors(  # noqa: SLF001
                number,
                tensors,
                helper,
                device="cpu",
                dtype=worker.lora_config.lora_dtype,
                model_vocab_size=worker.vocab_size,
                weights_mapper=self._weights_mapper,
            )
            self._manager.add_adapter(adapter)
            self._manager.activate_adapter(number)
        except Exception as error:  # it has no type of its own for what it cannot use
            raise UnusableError(str(error)) from error

    @property
    def _weights_mapper(self) -> Any:
        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        return mapper and mapper.get_rename_mapper()

    def _parse(self, name: str) -> tuple[str, bool]:
        if "embed_tokens" in name or "lm_head" in name:
            # vLLM takes the unadapted ones for log-probabilities of prompts.
            raise UnusableError(f"it adapts the embeddings, which this backend cannot: {name}")
        try:
            module, is_a = parse_fine_tuned_lora_name(name, self._weights_mapper)
        except ValueError as error:
            raise UnusableError(str(error)) from error
        return module, is_a

    def unload(self, number: int) -> None:
        """Free the slot and the memory of an adapter, which need not be there."""
        self._manager.remove_adapter(number)

    def slot_of(self, number: int, digest: str) -> int:
        """The slot that is known to hold what a request asked for; −1: the base model.

        Raises:
            IdentityError: none is.
        """
        if not number:
            return -1
        slots = self._manager.lora_index_to_id
        slot: int = slots.index(number) if number in slots else -1
        if self._verified.get(slot) != (number, digest):
            raise IdentityError(
                f"adapter {number} was asked for with the digest {digest}; what was read back from "
                f"its slot {slot} is {self._verified.get(slot)}"
            )
        return slot

    def used_by_tokens(self) -> NDArray[np.int64]:
        """The slot of each token of the batch at hand, as the kernels got it. −1: the base model.

        On a GPU, reading it from there would wait for the forward pass: it is what the kernels'
        table was made of.
        """
        wrapper = next(iter(self._manager.punica_wrapper_mapping.values()))
        indices = wrapper.token_lora_indices
        if indices.device.type == "cpu":
            return indices.numpy()  # type: ignore[no-any-return]
        numbers = np.array(self._manager._last_mapping.index_mapping)  # noqa: SLF001
        used = np.full(len(numbers), -1)
        for slot, number in enumerate(self._manager.lora_index_to_id):
            if number is not None:
                used[numbers == number] = slot
        return used


def _read(path: Path, digest: str) -> NDArray[np.uint8]:
    """The bytes of a file; MismatchError where it is not the one of `digest`."""
    try:
        file = np.fromfile(path, np.uint8)
        found = safetensors_digest(file.data)
    except (OSError, ValueError) as error:
        raise MismatchError(f"the file cannot be read: {error}") from error
    if found != digest:
        raise MismatchError(f"the file's tensors have the digest {found}")
    return file

"""Which LoRA slots of vLLM's hold which adapter, known from reading them back."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name

from rollmesh.digest import safetensors_digest
from services.sampler.backends.vllm_identity import (
    MismatchError,
    UnusableError,
    check_places,
    check_slot,
    expected_factors,
)
from services.sampler.backends.vllm_provenance import IdentityError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


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
        self.changes = 0
        for module in self._manager.modules.values():
            for name in ("set_lora", "reset_lora"):
                setattr(module, name, self._announced(getattr(module, name)))

    def _announced(self, write: Callable[..., None]) -> Callable[..., None]:
        """A module's method that writes to a slot, after which nothing is known of the slot."""

        def announced(index: int, *args: Any, **kwargs: Any) -> None:
            self._verified.pop(index, None)
            self.changes += 1
            write(index, *args, **kwargs)

        return announced

    def load(self, number: int, folder: Path, digest: str, config_json: str) -> None:
        """Put an adapter into a free slot and read it back from there; a failure frees the slot.

        Raises:
            UnusableError: vLLM cannot use it.
            MismatchError: the file does not have this digest, or the slot holds something else.
        """
        tensors = _read(folder / "adapter_model.safetensors", digest)
        manager, dtype = self._manager, self._worker.lora_config.lora_dtype
        try:
            config = json.loads(config_json)
            factors = expected_factors(tensors, config, dtype, self._parsed)
        except (ValueError, TypeError, LookupError, AttributeError, re.error) as error:
            raise UnusableError(f"adapter_config.json is not PEFT's: {error!r}") from error
        check_places(manager.modules, manager.packed_modules, factors)
        if None not in manager.lora_index_to_id and number not in manager.lora_index_to_id:
            raise UnusableError("all slots are taken")
        try:
            self._register(number, tensors, config)
            slot = manager.lora_index_to_id.index(number)
            check_slot(manager.modules, manager.packed_modules, slot, factors)
        except BaseException:
            self.unload(number)
            raise
        self._verified[slot] = (number, digest)
        self.changes += 1

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

    def _parsed(self, name: str) -> tuple[str, bool]:
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


def _read(path: Path, digest: str) -> dict[str, Any]:
    """Tensors of a file by name; MismatchError where it is not the one of `digest`."""
    try:
        data = path.read_bytes()
        found = safetensors_digest(data)
    except (OSError, ValueError) as error:
        raise MismatchError(f"the file cannot be read: {error}") from error
    if found != digest:
        raise MismatchError(f"the file's tensors have the digest {found}")
    tensors: dict[str, Any] = load(data)
    return tensors

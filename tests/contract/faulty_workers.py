"""vLLM's worker with the bugs that made others sample from a wrong policy, each on demand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.sampler.backends import vllm_ways
from services.sampler.backends.vllm_cpu import CpuWorker

PATH = f"{__name__}.FaultyWorker"


class FaultyWorker(CpuWorker):
    """The sampler's CPU worker, in which `break_` puts one bug and `mend` takes it out again."""

    def break_(self, bug: str) -> None:
        """Called by the test, in the worker."""
        getattr(self, f"_{bug}")(self.model_runner.lora_manager._adapter_manager)

    def mend(self) -> None:
        """The parts are as they were."""
        for part, name, whole in reversed(self._mended):
            setattr(part, name, whole)
        self._mended.clear()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mended: list[tuple[Any, str, Any]] = []

    def _replace(self, part: Any, name: str, broken: Any) -> None:
        self._mended.append((part, name, getattr(part, name)))
        setattr(part, name, broken)

    def forget_ways(self) -> None:
        """The next adapter is loaded by vLLM, as the first one of its kind is."""
        self._slots._copies._ways.clear()

    def knows_ways(self) -> bool:
        """It would be copied."""
        return bool(self._slots._copies._ways)

    def _copies_are_never_written(self, _: Any) -> None:
        self._replace(self._slots._copies._stacks, "write", lambda *_: None)

    def _one_layer_is_left_out_of_copies(self, manager: Any) -> None:
        stacks = self._slots._copies._stacks
        left_out = next(name for name in manager.modules if name.endswith("1.mlp.down_proj"))
        held = manager.modules[left_out].lora_b_stacked[0]

        def write(slot: int, flat: Any) -> None:
            before = held[slot].clone()
            type(stacks).write(stacks, slot, flat)
            held[slot] = before

        self._replace(stacks, "write", write)

    def _copies_are_of_another_adapter(self, _: Any) -> None:
        stacks = self._slots._copies._stacks
        self._replace(
            stacks, "write", lambda slot, _: type(stacks).write(stacks, slot, stacks.read(0))
        )

    def _copies_are_not_scaled(self, _: Any) -> None:
        self.forget_ways()
        self._replace(vllm_ways, "scaling_of", lambda *_: 1.0)

    def _weights_are_never_written(self, manager: Any) -> None:
        for module in manager.modules.values():
            self._replace(module, "set_lora", lambda *_: None)

    def _one_layer_is_left_out(self, manager: Any) -> None:
        left_out = next(name for name in manager.modules if name.endswith("1.mlp.down_proj"))
        self._replace(manager.modules[left_out], "set_lora", lambda *_: None)

    def _the_scaling_is_forgotten(self, manager: Any) -> None:
        add = manager.add_adapter

        def add_unscaled(adapter: Any) -> Any:
            for factors in adapter.loras.values():
                factors.scaling = 1
            return add(adapter)

        self._replace(manager, "add_adapter", add_unscaled)

    def _another_adapter_is_activated(self, manager: Any) -> None:
        add = manager.add_adapter

        def add_other(adapter: Any) -> Any:
            add(adapter)
            adapter.loras = next(iter(manager.list_adapters().values())).loras

        self._replace(manager, "add_adapter", add_other)

    def _tokens_are_mapped_to_the_base_model(self, manager: Any) -> None:
        set_mapping = manager.set_adapter_mapping

        def set_none(mapping: Any) -> None:
            none = (0,) * len(mapping.index_mapping)
            set_mapping(replace(mapping, index_mapping=none))

        self._replace(manager, "set_adapter_mapping", set_none)

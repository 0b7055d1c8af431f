"""All adapters of a trainer by name: what can be asked of them, and how many there may be."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rollmesh.errors import AlreadyExists, CapacityExhausted, NotFound
from rollmesh.names import parse_adapter
from rollmesh.telemetry import log_fields
from rollmesh.types import TrainerInfo
from services.trainer.adapter import Adapter
from services.trainer.checks import resolve_lora

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rollmesh.types import (
        AdamConfig,
        Datum,
        FloatArray,
        ForwardBackwardResult,
        LoraConfig,
        LossConfig,
        OptimStepResult,
        PublishedVersion,
        TrainerAdapter,
    )
    from services.trainer.export import AdapterVersion
    from services.trainer.model import Model

log = logging.getLogger(__name__)


class Adapters:
    """The adapters on one model.

    Everything runs in one thread, but for `info`, `get` and `version`, which any thread may call.
    Every method that names an adapter raises NotFound where it is not held.
    """

    def __init__(
        self,
        model: Model,
        *,
        base_model: str,
        max_rank: int,
        max_adapters: int,
        kept_versions: int,
    ) -> None:
        self._model = model
        self._base_model = base_model
        self._max_rank = max_rank
        self._max_adapters = max_adapters
        self._kept_versions = kept_versions
        self._adapters: dict[str, Adapter] = {}

    def info(self) -> TrainerInfo:
        """What is served and how full it is."""
        return TrainerInfo(
            base_model=self._base_model,
            vocab_size=self._model.vocab_size,
            max_length=self._model.max_length,
            max_rank=self._max_rank,
            num_adapters=len(self._adapters),
            max_adapters=self._max_adapters,
            target_modules=self._model.lora.target_modules,
            kept_versions=self._kept_versions,
        )

    def create(self, name: str, lora: LoraConfig) -> TrainerAdapter:
        """A fresh adapter, or the one that exists with the same configuration.

        Raises:
            InvalidRequest: the name, or a field of `lora`.
            AlreadyExists: one of that name with another configuration.
            CapacityExhausted: max_adapters are held.
        """
        parse_adapter(name)
        targets = self._model.lora.target_modules
        resolved = resolve_lora(lora, max_rank=self._max_rank, target_modules=targets)
        if name in self._adapters:
            held = self._adapters[name].view
            if held.lora != resolved:
                raise AlreadyExists(f"{name} exists with {held.lora}", resource=name)
            return held
        if len(self._adapters) >= self._max_adapters:
            raise CapacityExhausted(
                f"{len(self._adapters)} adapters are held, max_adapters is {self._max_adapters}",
                resource="adapters",
                value=len(self._adapters),
                allowed=self._max_adapters,
            )
        adapter = Adapter(
            name,
            resolved,
            self._model,
            base_model=self._base_model,
            kept_versions=self._kept_versions,
        )
        self._adapters[name] = adapter
        with log_fields(adapter=name):
            log.info("created")
        return adapter.view

    def get(self, name: str) -> TrainerAdapter:
        """The adapter as its newest finished op left it."""
        return self._held(name).view

    def delete(self, name: str) -> None:
        """Free an adapter and its versions; one that is not held is fine."""
        if self._adapters.pop(name, None):
            with log_fields(adapter=name):
                log.info("deleted")

    def forward(self, name: str, data: Sequence[Datum]) -> tuple[FloatArray, ...]:
        """See Adapter.forward."""
        return self._held(name).forward(data)

    def forward_backward(
        self, name: str, sequence: int, data: Sequence[Datum], config: LossConfig
    ) -> ForwardBackwardResult:
        """See Adapter.forward_backward."""
        return self._held(name).forward_backward(sequence, data, config)

    def optim_step(self, name: str, sequence: int, config: AdamConfig) -> OptimStepResult:
        """See Adapter.optim_step."""
        return self._held(name).optim_step(sequence, config)

    def publish(self, name: str) -> PublishedVersion:
        """See Adapter.publish."""
        return self._held(name).publish()

    def version(self, name: str, policy_version: int) -> AdapterVersion:
        """See Adapter.version."""
        return self._held(name).version(policy_version)

    def _held(self, name: str) -> Adapter:
        try:
            return self._adapters[name]
        except KeyError:
            raise NotFound(f"{name!r} is not held by this trainer", resource=name) from None

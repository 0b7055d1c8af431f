"""Makes adapters: which trainer a new one goes to, and what lies in its way there."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import CapacityExhausted, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollmesh import types
    from services.coordinator.fleet.static import StaticFleet
    from services.coordinator.ports import TrainerPort
    from services.coordinator.store import AdapterStore, StoredAdapter

log = logging.getLogger(__name__)


async def make(
    stored: StoredAdapter,
    lora: types.LoraConfig,
    store: AdapterStore,
    fleet: StaticFleet,
    trainers: Mapping[str, TrainerPort],
    *,
    num_versions: int,
) -> types.TrainerAdapter:
    """Make a reserved adapter on the trainer with the most room, which is written down first.

    Trainers differ: one that does not take `lora`, or keeps fewer than `num_versions` versions, is
    passed over.

    Raises:
        CapacityExhausted: no trainer that would take it has room.
        InvalidRequest: no trainer takes it; what the first of them says.
        Unavailable: no trainer of the base model answers.
    """
    name, base_model = stored.adapter.name, stored.adapter.base_model
    if stored.trainer in trainers:
        # A creation before this one died, and may have left a copy.
        with contextlib.suppress(Unavailable):
            await trainers[stored.trainer].delete_adapter(name)
    serving = fleet.trainers(base_model)
    if not serving:
        raise Unavailable(f"no trainer of {base_model!r} answers", value=base_model)
    refusals: list[InvalidRequest] = []
    for trainer in sorted(serving, key=lambda trainer: -_room(trainer.info)):
        kept = trainer.info.kept_versions if trainer.info else 0
        if kept < num_versions:
            refusals.append(_too_few(kept, num_versions))
            continue
        await store.place(name, trainer.address)
        # A trainer answers an equal adapter that it has, however far that was trained. Nobody knows
        # of one here, so what it may have is not this one.
        await trainer.port.delete_adapter(name)
        try:
            return await trainer.port.create_adapter(name, lora)
        except CapacityExhausted as error:
            log.info("no room for %s at %s: %s", name, trainer.address, error)
        except InvalidRequest as error:
            refusals.append(error)
    if len(refusals) == len(serving):
        raise refusals[0]
    raise CapacityExhausted(
        f"every trainer of {base_model!r} is full: {len(serving) - len(refusals)} of them were "
        "asked",
        value=base_model,
    )


def _too_few(kept: int, num_versions: int) -> InvalidRequest:
    return InvalidRequest(
        f"algorithm.max_staleness: it needs {num_versions} versions, the trainer keeps {kept}",
        field="algorithm.max_staleness",
    )


def _room(info: types.TrainerInfo | None) -> int:
    return info.max_adapters - info.num_adapters if info else 0

"""Makes adapters: which trainer a new one goes to, and what lies in its way there."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from rollmesh.errors import CapacityExhausted, Unavailable

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
) -> types.TrainerAdapter:
    """Make a reserved adapter on the trainer with the most room, which is written down first.

    Raises:
        CapacityExhausted: no trainer has room.
        Unavailable: no trainer of the base model answers.
        MeshError: what the trainer says of `lora`.
    """
    name, base_model = stored.adapter.name, stored.adapter.base_model
    if stored.trainer in trainers:
        # A creation before this one died, and may have left a copy.
        with contextlib.suppress(Unavailable):
            await trainers[stored.trainer].delete_adapter(name)
    serving = fleet.trainers(base_model)
    if not serving:
        raise Unavailable(f"no trainer of {base_model!r} answers", value=base_model)
    for trainer in sorted(serving, key=lambda trainer: -_room(trainer.info)):
        await store.place(name, trainer.address)
        # A trainer answers an equal adapter that it has, however far that was trained. Nobody knows
        # of one here, so what it may have is not this one.
        await trainer.port.delete_adapter(name)
        try:
            return await trainer.port.create_adapter(name, lora)
        except CapacityExhausted as error:
            log.info("no room for %s at %s: %s", name, trainer.address, error)
    raise CapacityExhausted(
        f"every trainer of {base_model!r} is full: {len(serving)} of them were asked",
        value=base_model,
    )


def _room(info: types.TrainerInfo | None) -> int:
    return info.max_adapters - info.num_adapters if info else 0

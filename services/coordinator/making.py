"""Makes adapters: which trainer a new one goes to, and what lies in its way there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rollmesh.errors import CapacityExhausted, InvalidRequest, Unavailable
from services.coordinator.recovery import create

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh import types
    from services.coordinator.ownership import Ownership
    from services.coordinator.store import AdapterStore, StoredAdapter

log = logging.getLogger(__name__)


async def make(
    stored: StoredAdapter,
    store: AdapterStore,
    ownership: Ownership,
    *,
    clock: Callable[[], float],
) -> types.TrainerAdapter:
    """Make a reserved adapter on the trainer with the most room, which is written down first.

    Trainers differ: one that does not take its shape, or keeps too few versions, is passed over.
    What an earlier attempt left somewhere is under an older epoch.

    Raises:
        CapacityExhausted: no trainer that would take it has room.
        InvalidRequest: no trainer takes it; what the first of them says.
        Unavailable: no trainer of the base model answers.
    """
    name, base_model = stored.adapter.name, stored.adapter.base_model
    candidates = ownership.candidates(base_model)
    if not candidates:
        raise Unavailable(f"no trainer of {base_model!r} answers", value=base_model)
    refusals: list[InvalidRequest] = []
    for trainer in candidates:
        kept = trainer.info.kept_versions if trainer.info else 0
        if kept < stored.num_versions:
            refusals.append(_too_few(kept, stored.num_versions))
            continue
        # At once: others that are made meanwhile should go elsewhere.
        ownership.note_given(trainer)
        stored = await store.give(stored, trainer.address, now=clock())
        try:
            async with ownership.call(trainer.address):
                return await create(trainer.port, stored)
        except CapacityExhausted as error:
            log.info("no room for %s at %s: %s", name, trainer.address, error)
        except InvalidRequest as error:
            refusals.append(error)
    if len(refusals) == len(candidates):
        raise refusals[0]
    raise CapacityExhausted(
        f"every trainer of {base_model!r} is full: {len(candidates) - len(refusals)} of them were "
        "asked",
        value=base_model,
    )


def _too_few(kept: int, num_versions: int) -> InvalidRequest:
    return InvalidRequest(
        f"algorithm.max_staleness: it needs {num_versions} versions, the trainer keeps {kept}",
        field="algorithm.max_staleness",
    )

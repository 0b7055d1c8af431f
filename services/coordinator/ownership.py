"""Which trainers may own adapters, and which of them a given one should go to.

A trainer's ownership is a lease that each good poll renews. Once it is over the trainer's adapters
may be given to others, so whatever is under way there is cut off: its answers come too late.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING

from rollmesh.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rollmesh import types
    from services.coordinator.fleet.membership import Fleet, Trainer


class Ownership:
    """Leases of `lease_s` seconds, from each trainer's last good poll on.

    A trainer that was not heard of yet has its lease from the first question about one on.
    """

    def __init__(self, fleet: Fleet, *, lease_s: float) -> None:
        self._fleet = fleet
        self._lease_s = lease_s
        self._begin: float | None = None
        self._calls: defaultdict[str, set[asyncio.Timeout]] = defaultdict(set)
        # Adapters given since the poll whose answer is beside them.
        self._given: dict[str, tuple[types.TrainerInfo | None, int]] = {}

    async def run(self) -> None:
        """Cut off calls to trainers whose lease is over, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._lease_s / 4))
            for address in [address for address in self._calls if self.is_over(address)]:
                for call in self._calls[address]:
                    if not call.expired() and call.when() is None:
                        call.reschedule(asyncio.get_running_loop().time())

    def is_over(self, address: str) -> bool:
        """Whether the trainer at `address` owns nothing any more."""
        now = asyncio.get_running_loop().time()
        if self._begin is None:
            self._begin = now
        trainer = self._fleet.trainer(address)
        if trainer is None:
            return True
        heard = self._begin if trainer.heard is None else trainer.heard
        return not trainer.serving and now - heard > self._lease_s

    def trainer(self, address: str, base_model: str) -> Trainer | None:
        """The trainer at `address`, if it may own adapters on `base_model`."""
        trainer = self._fleet.trainer(address)
        if trainer is None or self.is_over(address):
            return None
        return trainer if not trainer.info or trainer.info.base_model == base_model else None

    def instance(self, address: str) -> str:
        """Which process last answered at `address`; "": none yet."""
        trainer = self._fleet.trainer(address)
        return trainer.info.instance_id if trainer and trainer.info else ""

    def is_draining(self, address: str) -> bool:
        """Whether the trainer at `address` says that its adapters should go elsewhere."""
        trainer = self._fleet.trainer(address)
        return bool(trainer and trainer.info and trainer.info.draining)

    @contextlib.asynccontextmanager
    async def call(self, address: str) -> AsyncIterator[None]:
        """Call the trainer at `address` inside.

        Raises:
            Unavailable: its lease ended first.
        """
        calls = self._calls[address]
        try:
            async with asyncio.timeout(None) as call:
                calls.add(call)
                try:
                    yield
                finally:
                    calls.discard(call)
        except TimeoutError:
            raise Unavailable(
                f"the trainer at {address} was not heard of for {self._lease_s:g} s"
            ) from None

    def candidates(self, base_model: str) -> list[Trainer]:
        """Trainers that serve and are not draining, the one with the most room first."""
        serving = [
            trainer
            for trainer in self._fleet.trainers(base_model)
            if trainer.info and not trainer.info.draining
        ]
        return sorted(serving, key=self._room, reverse=True)

    def has_room(self, trainer: Trainer) -> bool:
        """Whether one more adapter may go there, as far as its last poll says."""
        info = trainer.info
        if info is None or self._room(trainer) <= 0:
            return False
        mean_bytes = info.adapter_bytes / max(info.num_adapters, 1)
        return not info.max_adapter_bytes or (
            info.adapter_bytes + mean_bytes <= info.max_adapter_bytes
        )

    def note_given(self, trainer: Trainer) -> None:
        """Count an adapter that `trainer` was given until its next poll does."""
        polled, count = self._given.get(trainer.address, (None, 0))
        count = count if polled is trainer.info else 0
        self._given[trainer.address] = (trainer.info, count + 1)

    def _room(self, trainer: Trainer) -> int:
        if trainer.info is None:
            return 0
        polled, count = self._given.get(trainer.address, (None, 0))
        given = count if polled is trainer.info else 0
        return trainer.info.max_adapters - trainer.info.num_adapters - given

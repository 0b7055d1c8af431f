"""Where the scheduler's decisions meet the fleet: requests wait here for their sampler."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rollmesh import telemetry
from rollmesh.errors import InternalError, SourceUnavailable, Unavailable
from services.coordinator.scheduler import Policy, Request, SamplerState, Scheduler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rollmesh import types
    from services.coordinator.fleet.static import Sampler, StaticFleet


@dataclass(slots=True)
class _Turn:
    """The wait of one request for its sampler."""

    came: asyncio.Event = field(default_factory=asyncio.Event)
    sampler: Sampler | None = None


class Placement:
    """Asks the scheduler again whenever something changed: a request, a place, the fleet."""

    def __init__(self, fleet: StaticFleet, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._fleet = fleet
        self._ids = itertools.count(1)
        # Bounded: one for each request that waits, and the scheduler's queues are.
        self._turns: dict[int, _Turn] = {}
        self._loaded: dict[str, set[Policy]] = {}
        fleet.on_change(self._fleet_changed)

    def request(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        *,
        num_prompt_tokens: int,
        num_completions: int,
    ) -> Request:
        """A new request, to be placed once."""
        return Request(
            id=next(self._ids),
            project=project,
            base_model=base_model,
            policy=(source.adapter, source.policy_version) if source else None,
            num_prompt_tokens=num_prompt_tokens,
            num_completions=num_completions,
        )

    @contextlib.asynccontextmanager
    async def sampler_for(self, request: Request) -> AsyncIterator[Sampler]:
        """Wait for the sampler that the scheduler gives `request`; it is held while the block runs.

        A block that fails because its sampler is lost marks it so.

        Raises:
            Overloaded: the project's queue is full.
        """
        sampler = await self._turn(request)
        completed = False
        try:
            yield sampler
            completed = True
            if request.policy is not None:
                self.note_loaded(sampler, request.policy)
        except SourceUnavailable:
            raise  # Its trainer's trouble: the sampler is well, and others sample there.
        except (Unavailable, InternalError) as error:
            self._fleet.suspect(sampler, str(error))
            raise
        finally:
            self.scheduler.finish(request.id, completed=completed)
            self._dispatch()

    def progress(self, request: Request, *, num_tokens: int, ended: bool) -> None:
        """A request got tokens; one of its completions may have `ended` and left its place."""
        self.scheduler.progress(request.id, num_tokens=num_tokens, num_finished=int(ended))
        if ended:
            self._dispatch()

    def note_loaded(self, sampler: Sampler, policy: Policy) -> None:
        """A sampler holds `policy` now: known at once and not only with the next poll."""
        self._loaded.setdefault(sampler.address, set()).add(policy)

    def note_unloaded(self, sampler: Sampler, adapter: str, policy_version: int | None) -> None:
        """A sampler was told to let go of a version (None: all)."""
        loaded = self._loaded.get(sampler.address, set())
        loaded -= {
            live for live in loaded if live[0] == adapter and policy_version in {None, live[1]}
        }

    async def _turn(self, request: Request) -> Sampler:
        self.scheduler.submit(request)
        turn = self._turns[request.id] = _Turn()
        try:
            self._dispatch()
            await turn.came.wait()
        except asyncio.CancelledError:
            if turn.sampler is None:
                self.scheduler.withdraw(request)
                self._tell_queued()
            else:
                self.scheduler.finish(request.id, completed=False)
                self._dispatch()
            raise
        finally:
            del self._turns[request.id]
        assert turn.sampler is not None  # noqa: S101 - set before the event is
        return turn.sampler

    def _fleet_changed(self) -> None:
        self._loaded = {
            sampler.address: {(live.adapter, live.policy_version) for live in sampler.info.loaded}
            for sampler in self._serving()
            if sampler.info
        }
        self._dispatch()

    def _dispatch(self) -> None:
        """Give turns to whoever the scheduler says is next."""
        if not self.scheduler.num_queued:
            return
        serving = {sampler.address: sampler for sampler in self._serving()}
        states = [
            SamplerState(address, sampler.info.base_model, self._loaded.get(address, ()))
            for address, sampler in serving.items()
            if sampler.info
        ]
        for assignment in self.scheduler.assign(states):
            turn = self._turns[assignment.request.id]
            turn.sampler = serving[assignment.address]
            turn.came.set()
        self._tell_queued()

    def _tell_queued(self) -> None:
        telemetry.record("rollmesh.scheduler.queued", self.scheduler.num_queued)

    def _serving(self) -> list[Sampler]:
        models = self._fleet.base_models()
        return [sampler for model in models for sampler in self._fleet.samplers(model)]

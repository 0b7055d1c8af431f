"""Where the scheduler's decisions meet the fleet: requests wait here for their sampler."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rollmesh import telemetry
from rollmesh.errors import InternalError, NotFound, Overloaded, SourceUnavailable, Unavailable
from services.coordinator.drawing import Untrue
from services.coordinator.endurance import Unserved
from services.coordinator.fleet.limits import Limits
from services.coordinator.scheduler import Policy, Request, SamplerState, Scheduler, prefixes_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rollmesh import types
    from services.coordinator.endurance import Endurance
    from services.coordinator.fleet.static import Sampler, StaticFleet


FULL_FOR_S = 1.0
"""A sampler without room is asked again after this long, whatever time it said: what it has under
way may end sooner."""


class Refused(Exception):
    """A sampler has no room for the request that it was given: it is to be resumed."""

    def __init__(self, error: Overloaded) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class _Turn:
    """The wait of one request for its sampler."""

    # Set when its sampler has come, and whenever the fleet has changed.
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    sampler: Sampler | None = None


class Placement:
    """Asks the scheduler again whenever something changed: a request, a place, the fleet."""

    def __init__(self, fleet: StaticFleet, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._fleet = fleet
        self._limits = Limits(fleet)
        self._ids = itertools.count(1)
        # Bounded: one for each request that waits, and the scheduler's queues are.
        self._turns: dict[int, _Turn] = {}
        self._loaded: dict[str, set[Policy]] = {}
        # By address: until when a sampler takes nothing.
        self._full: dict[str, asyncio.TimerHandle] = {}
        fleet.on_change(self._fleet_changed)

    def request(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        *,
        num_completions: int,
        max_tokens: int | None,
        job: str = "",
        resumed: bool = False,
        avoid: str = "",
    ) -> Request:
        """A new request, to be placed once.

        `resumed`: it goes on with what has had a place. `avoid`: the address where it was lost.
        """
        policy = (source.adapter, source.policy_version) if source else None
        return Request(
            id=next(self._ids),
            project=project,
            base_model=base_model,
            policy=policy,
            num_prompt_tokens=len(prompt_token_ids),
            num_completions=num_completions,
            max_tokens=max_tokens,
            prefixes=prefixes_of(project, policy, prompt_token_ids),
            resumed=resumed,
            avoid=avoid,
            job=job,
        )

    @contextlib.asynccontextmanager
    async def sampler_for(self, request: Request, endurance: Endurance) -> AsyncIterator[Sampler]:
        """Wait for the sampler that the scheduler gives `request`; it is held while the block runs.

        A block that fails because its sampler is lost marks it so; one that fails because of what
        the sampler sent puts it into quarantine.

        Raises:
            Overloaded: the project's queue is full.
            Refused: the sampler's is.
            Unserved: no sampler has served for `endurance.unserved_s`.
            SourceUnavailable: the sampler cannot have the version, by now or yet.
        """
        sampler = await self._turn(request, endurance)
        assert sampler.info is not None  # noqa: S101 - it serves
        # By the time of a failure another process may be there.
        instance_id = sampler.info.instance_id
        completed = False
        try:
            yield sampler
            completed = True
            if request.policy is not None:
                self.note_loaded(sampler, request.policy)
        except SourceUnavailable:
            raise  # Its trainer's trouble: the sampler is well, and others sample there.
        except NotFound as error:
            if request.policy is None:
                raise
            # It was there when it was resolved: a trainer that came back has it again soon.
            raise SourceUnavailable(str(error), **error.context) from error
        except Untrue as error:
            self._fleet.quarantine(instance_id, str(error))
            raise
        except (Unavailable, InternalError) as error:
            self._fleet.suspect(sampler, str(error))
            raise
        except Overloaded as error:
            self._note_full(sampler, error.retry_after_s)
            raise Refused(error) from error
        finally:
            self.scheduler.finish(request.id, completed=completed)
            self._dispatch()

    def while_serving(
        self, sampler: Sampler, *, for_s: float
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """Raise Unavailable in a block that runs on after `sampler` has been out for so long."""
        return self._limits.amiss(
            lambda: not sampler.serving,
            for_s=for_s,
            error=Unavailable(f"the sampler at {sampler.address} is lost"),
        )

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

    async def _turn(self, request: Request, endurance: Endurance) -> Sampler:
        self.scheduler.submit(request)
        turn = self._turns[request.id] = _Turn()
        try:
            self._dispatch()
            async with self._limited(request, endurance.unserved_s):
                while turn.sampler is None:
                    turn.stirred.clear()
                    await endurance.served(
                        self._fleet.unserved(request.base_model, job=request.job)
                    )
                    await turn.stirred.wait()
        except BaseException:
            if turn.sampler is None:
                self.scheduler.withdraw(request)
                self._tell_queued()
            else:
                self.scheduler.finish(request.id, completed=False)
                self._dispatch()
            raise
        finally:
            del self._turns[request.id]
        return turn.sampler

    def _limited(
        self, request: Request, unserved_s: float | None
    ) -> contextlib.AbstractAsyncContextManager[None]:
        if unserved_s is None:
            return contextlib.nullcontext()
        return self._limits.amiss(
            lambda: not self._fleet.samplers(request.base_model, job=request.job),
            for_s=unserved_s,
            error=Unserved(
                f"for {unserved_s:g} s no sampler of {request.base_model!r} has served",
                base_model=request.base_model,
            ),
        )

    def _fleet_changed(self) -> None:
        self._loaded = {
            sampler.address: {(live.adapter, live.policy_version) for live in sampler.info.loaded}
            for sampler in self._serving()
            if sampler.info
        }
        self._dispatch()
        for turn in self._turns.values():
            turn.stirred.set()

    def _note_full(self, sampler: Sampler, for_s: float) -> None:
        if sampler.address not in self._full:
            loop = asyncio.get_running_loop()
            delay_s = min(for_s, FULL_FOR_S)
            self._full[sampler.address] = loop.call_later(delay_s, self._note_room, sampler)

    def _note_room(self, sampler: Sampler) -> None:
        del self._full[sampler.address]
        self._dispatch()

    def _dispatch(self) -> None:
        """Give turns to whoever the scheduler says is next."""
        if not self.scheduler.num_queued:
            return
        serving = {sampler.address: sampler for sampler in self._serving()}
        states = [
            self._state(sampler, sampler.info) for sampler in serving.values() if sampler.info
        ]
        for assignment in self.scheduler.assign(states):
            turn = self._turns[assignment.request.id]
            turn.sampler = serving[assignment.address]
            turn.stirred.set()
        self._tell_queued()

    def _state(self, sampler: Sampler, info: types.SamplerInfo) -> SamplerState:
        return SamplerState(
            sampler.address,
            info.base_model,
            self._loaded.get(sampler.address, ()),
            resident={(live.adapter, live.policy_version) for live in info.resident},
            max_loras=info.max_loras,
            num_queued=info.num_queued,
            full=sampler.address in self._full,
            refused_by=self._fleet.refused_by(sampler),
        )

    def _tell_queued(self) -> None:
        telemetry.record("rollmesh.scheduler.queued", self.scheduler.num_queued)

    def _serving(self) -> list[Sampler]:
        models = self._fleet.base_models()
        return [sampler for model in models for sampler in self._fleet.samplers(model)]

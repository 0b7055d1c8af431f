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
from services.coordinator.moving import Place
from services.coordinator.scheduler import (
    PRIORITIES,
    Policy,
    Request,
    SamplerState,
    Scheduler,
    prefixes_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from rollmesh import types
    from rollmesh.job import Priority
    from services.coordinator.endurance import Endurance
    from services.coordinator.fleet.membership import Fleet, Sampler


FULL_FOR_S = 1.0
"""A sampler without room is asked again after this long, whatever time it said: what it has under
way may end sooner."""


LEAVES_WITHIN_S = 3.0
"""A preempted request whose caller has not read on for so long loses its place all the same."""


class Preempted(Exception):
    """A request gave its place up to one of a higher class: it is to be resumed."""


class Refused(Exception):
    """A sampler has no room for the request that it was given: it is to be resumed."""

    def __init__(self, error: Overloaded) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class _Turn:
    """The wait of one request for its sampler."""

    request: Request
    # Why it can ask no sampler now; empty: it can.
    problem: str = ""
    # Set when its place has come, and whenever its problem has changed.
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    place: Place | None = None
    # It is to wait no more.
    refusal: Overloaded | None = None

    def check(self) -> None:
        """Raise why it is to wait no more."""
        if self.refusal:
            raise self.refusal


class Placement:
    """Asks the scheduler again whenever something changed: a request, a place, the fleet."""

    def __init__(self, fleet: Fleet, scheduler: Scheduler, *, clock: Callable[[], float]) -> None:
        self.scheduler = scheduler
        self._fleet = fleet
        self._clock = clock
        self._limits = Limits(fleet)
        self._ids = itertools.count(1)
        # One for each request that waits: queues are bounded, and jobs bound their lines.
        self._turns: dict[int, _Turn] = {}
        # Requests of jobs that wait until their project's queue is not full, in their order.
        self._lines: dict[tuple[int, str, str], dict[int, Request]] = {}
        # Of what the scheduler has running.
        self._places: dict[int, Place] = {}
        self._loaded: dict[str, set[Policy]] = {}
        # As the scheduler was told of them last; None: that has changed.
        self._samplers: dict[str, Sampler] = {}
        self._states: list[SamplerState] | None = None
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
        priority: Priority = "normal",
        preemptible: bool = True,
        resumed: bool = False,
        anew: bool = False,
        avoid: str = "",
    ) -> Request:
        """A new request, to be placed once.

        `preemptible`: it can go on where it was. `resumed`: it goes on with what has had a place,
        `anew`: but begins.
        `avoid`: the address where it was lost.
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
            anew=anew,
            avoid=avoid,
            job=job,
            priority=PRIORITIES[priority],
            preemptible=preemptible,
        )

    @contextlib.asynccontextmanager
    async def place_for(self, request: Request, endurance: Endurance) -> AsyncIterator[Place]:
        """Wait for the place that the scheduler gives `request`; it is held while the block runs.

        A block that fails because its sampler is lost marks it so; one that fails because of what
        the sampler sent puts it into quarantine. One whose place is preempted raises Preempted,
        soon, or ends.

        Raises:
            Overloaded: the project's queue is full, or (QuotaExceeded) a quota of it is used up.
            Refused: the sampler's is.
            Unserved: no sampler has served for `endurance.unserved_s`.
            SourceUnavailable: the sampler cannot have the version, by now or yet.
        """
        place = await self._turn(request, endurance)
        sampler = place.sampler
        assert sampler.info is not None  # noqa: S101 - it serves
        # By the time of a failure another process may be there.
        instance_id = sampler.info.instance_id
        completed = preempted = False
        try:
            yield place
            completed = True
            if request.policy is not None:
                self.note_loaded(sampler, request.policy)
        except Preempted:
            preempted = True
            raise
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
            self._finish(request, completed=completed, preempted=preempted)

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
            self.dispatch()

    def dispatch(self) -> None:
        """Give places to whoever the scheduler says is next, and have them freed for others."""
        if not self.scheduler.num_queued and not self._lines:
            return
        now = self._clock()
        if self._states is None:
            self._samplers = {sampler.address: sampler for sampler in self._serving()}
            self._states = [
                self._state(sampler, sampler.info)
                for sampler in self._samplers.values()
                if sampler.info
            ]
        states = self._states
        more = True
        while more:
            for assignment in self.scheduler.assign(states, now):
                turn = self._turns[assignment.request.id]
                turn.place = Place(self._samplers[assignment.address])
                self._places[assignment.request.id] = turn.place
                turn.stirred.set()
            for request, error in self.scheduler.refused(now):
                turn = self._turns[request.id]
                turn.refusal = error
                turn.stirred.set()
            more = self._let_in(now)
        for request_id in self.scheduler.preempt(states, now):
            self._places[request_id].preempt()
            loop = asyncio.get_running_loop()
            loop.call_later(LEAVES_WITHIN_S, self._evict, request_id)
        self._tell_queued()

    def note_loaded(self, sampler: Sampler, policy: Policy) -> None:
        """A sampler holds `policy` now: known at once and not only with the next poll."""
        self._loaded.setdefault(sampler.address, set()).add(policy)

    def note_unloaded(self, sampler: Sampler, adapter: str, policy_version: int | None) -> None:
        """A sampler was told to let go of a version (None: all)."""
        loaded = self._loaded.get(sampler.address, set())
        loaded -= {
            live for live in loaded if live[0] == adapter and policy_version in {None, live[1]}
        }

    async def _turn(self, request: Request, endurance: Endurance) -> Place:
        if request.job and not request.resumed and not self.scheduler.has_room(request):
            self._lines.setdefault(_line_of(request), {})[request.id] = request
        else:
            self.scheduler.submit(request, self._clock())
        turn = _Turn(request, self._fleet.unserved(request.base_model, job=request.job))
        self._turns[request.id] = turn
        try:
            self.dispatch()
            async with self._limited(request, endurance.unserved_s):
                while turn.place is None:
                    turn.check()
                    turn.stirred.clear()
                    await endurance.served(turn.problem)
                    await turn.stirred.wait()
        except BaseException:
            if turn.place is None:
                self._withdraw(request)
            else:
                self._finish(request, completed=False)
            raise
        finally:
            del self._turns[request.id]
        return turn.place

    def _withdraw(self, request: Request) -> None:
        line = self._lines.get(_line_of(request), {})
        if request.id in line:
            del line[request.id]
            if not line:
                del self._lines[_line_of(request)]
            return
        self.scheduler.withdraw(request)
        self._tell_queued()
        # It may have been what held others of its project back.
        self.dispatch()

    def _let_in(self, now: float) -> bool:
        """Have those in line wait in their queues, as far as there is room; whether any does."""
        some = False
        for key, line in sorted(self._lines.items(), key=lambda item: item[0], reverse=True):
            for request in list(line.values()):
                if not self.scheduler.has_room(request):
                    break
                self.scheduler.submit(request, now)
                del line[request.id]
                some = True
            if not line:
                del self._lines[key]
        return some

    def _finish(self, request: Request, *, completed: bool, preempted: bool = False) -> None:
        if self._places.pop(request.id, None) is None:
            return  # Its caller did not read on, and its place was taken away.
        self.scheduler.finish(
            request.id, completed=completed, preempted=preempted, now=self._clock()
        )
        self.dispatch()

    def _evict(self, request_id: int) -> None:
        place = self._places.get(request_id)
        if place and (leaving := place.evict()):
            leaving.add_done_callback(lambda _: self._evicted(request_id))

    def _evicted(self, request_id: int) -> None:
        if self._places.pop(request_id, None):
            now = self._clock()
            self.scheduler.finish(request_id, completed=False, preempted=True, now=now)
            self.dispatch()

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
        self._states = None
        self.dispatch()
        problems: dict[tuple[str, str], str] = {}
        for turn in self._turns.values():
            asked = turn.request.base_model, turn.request.job
            if asked not in problems:
                problems[asked] = self._fleet.unserved(asked[0], job=asked[1])
            # Not all that wait whenever a sampler says something new: there may be thousands.
            if problems[asked] != turn.problem:
                turn.problem = problems[asked]
                turn.stirred.set()

    def _note_full(self, sampler: Sampler, for_s: float) -> None:
        if sampler.address not in self._full:
            loop = asyncio.get_running_loop()
            delay_s = min(for_s, FULL_FOR_S)
            self._states = None
            self._full[sampler.address] = loop.call_later(delay_s, self._note_room, sampler)

    def _note_room(self, sampler: Sampler) -> None:
        del self._full[sampler.address]
        self._states = None
        self.dispatch()

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


def _line_of(request: Request) -> tuple[int, str, str]:
    return request.priority, request.base_model, request.project

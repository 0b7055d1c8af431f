"""Runs jobs: makes what runs here equal to what the store says should run.

The store decides alone. A pause, a cancel or a new job is a row that changed; whoever writes it
wakes the runner, and a wake-up that got lost costs one poll. What runs when the process ends is
left RUNNING in the store, and the successor goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from rollmesh.errors import CapacityExhausted, FailedPrecondition, MeshError, Unavailable
from rollmesh.names import adapter_name, parse_job
from rollmesh.telemetry import log_fields
from services.coordinator.jobs import lora_of, num_versions
from services.coordinator.store import QUEUE, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.job import Happening, JobSpec
    from services.coordinator.fleet.static import StaticFleet
    from services.coordinator.lifecycle import Command
    from services.coordinator.loop import Outcome
    from services.coordinator.ports import JobContext, Recorder, Training
    from services.coordinator.store import JobStore, QueuedJob, StoredJob

log = logging.getLogger(__name__)

_POLL_S = 1.0
_RETRY_S = 2.0
"""A job that could not begin for want of room or of an answer is tried again after this long."""
_MAX_REASON = 2000


class Play(Protocol):
    """Runs a job's loop to its outcome; raises MeshError where the job fails."""

    async def __call__(self, context: JobContext, recorder: Recorder) -> Outcome:
        """Run until the job has finished, or was asked to pause and is between two steps."""
        ...


class Runner:
    """The jobs that run in this process.

    Args:
        store: what should run.
        fleet: what a job waits for.
        training: makes the adapters.
        play: the loop of a job.
        max_running: jobs at once; the others wait in the order of their creation.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: JobStore,
        fleet: StaticFleet,
        training: Training,
        play: Play,
        *,
        max_running: int,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._training = training
        self._play = play
        self._max_running = max_running
        self._clock = clock
        self._running: dict[str, asyncio.Task[None]] = {}
        self._pausing: set[str] = set()
        self._retry_at: dict[str, float] = {}

    async def run(self) -> None:
        """Run jobs until cancelled, which changes no job's state."""
        self._fleet.on_change(lambda: self._store.changes.wake(QUEUE))
        async with asyncio.TaskGroup() as tasks:
            while True:
                changed = self._store.changes.next(QUEUE)
                try:
                    await self._reconcile(tasks)
                except StoreUnavailable as error:
                    log.warning("the queue cannot be read: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await changed.wait()

    async def _reconcile(self, tasks: asyncio.TaskGroup) -> None:
        queue = await self._store.queue()
        wanted = {job.name for job in queue}
        self._pausing = {job.name for job in queue if job.phase == "PAUSING"}
        self._retry_at = {name: at for name, at in self._retry_at.items() if name in wanted}
        for name, task in self._running.items():
            # Once: a second time would cut off its cleaning up.
            if name not in wanted and not task.cancelling():
                task.cancel()
        for job in queue:
            if job.name not in self._running:
                await self._admit(job, tasks)

    async def _admit(self, job: QueuedJob, tasks: asyncio.TaskGroup) -> None:
        if job.phase == "PAUSING":  # The process that ran it ended first.
            with contextlib.suppress(FailedPrecondition):  # Its user was faster.
                await self._store.command(job.name, "settle", now=self._clock())
            return
        obstacle = self._obstacle(job)
        if obstacle is None:
            task = tasks.create_task(self._run(job.name))
            self._running[job.name] = task
            task.add_done_callback(lambda _: self._ended(job.name))
        elif obstacle != job.state_reason:
            await self._store.explain(job.name, obstacle, now=self._clock())

    def _obstacle(self, job: QueuedJob) -> str | None:
        """What the job waits for; None: nothing."""
        if len(self._running) >= self._max_running:
            return f"waits for its turn: {self._max_running} jobs run already"
        if not self._fleet.trainers(job.base_model):
            return f"waits for a trainer of {job.base_model!r}"
        if not self._fleet.samplers(job.base_model):
            return f"waits for a sampler of {job.base_model!r}"
        if self._retry_at.get(job.name, 0.0) > asyncio.get_running_loop().time():
            return job.state_reason
        return None

    def _ended(self, name: str) -> None:
        del self._running[name]
        self._store.changes.wake(QUEUE)

    async def _run(self, name: str) -> None:
        """One job, to its end, to its pause, or to where it has to wait again."""
        with log_fields(job=name):
            try:
                await self._run_or_fail(name)
            except StoreUnavailable as error:
                log.warning("stopped until the store answers again: %s", error)
                self._retry_later(name)

    async def _run_or_fail(self, name: str) -> None:
        try:
            if await self._prepare(name):
                await self._play_to_the_end(name)
        except StoreUnavailable:
            raise
        except MeshError as error:
            log.info("failed: %s", error)
            await self._fail(name, str(error)[:_MAX_REASON])
        except Exception:
            log.exception("failed by a bug")
            await self._fail(name, "internal error in the coordinator; its log has the traceback")

    async def _prepare(self, name: str) -> bool:
        """Make the adapter, unless it is there, and move to RUNNING; False: it has to wait."""
        stored = await self._store.load(name)
        spec = stored.spec
        try:
            await self._training.create_adapter(
                _adapter(stored),
                spec.base_model,
                lora_of(spec.adapter),
                job=name,
                request_id="",
                num_versions=num_versions(spec),
            )
        except StoreUnavailable:
            raise
        except (CapacityExhausted, Unavailable) as error:
            await self._store.explain(name, f"waits: {error}", now=self._clock())
            self._retry_later(name)
            return False
        await self._store.command(name, "start", now=self._clock())
        return True

    async def _play_to_the_end(self, name: str) -> None:
        state = "RUNNING"
        while state == "RUNNING":
            stored = await self._store.load(name)
            context = Context(stored, _adapter(stored), lambda: name in self._pausing)
            recorder = StoreRecorder(
                self._store, name, self._clock, partial(self._note_pausing, name)
            )
            with log_fields(adapter=context.adapter):
                log.info("runs from step %d", context.step)
                outcome = await self._play(context, recorder)
                log.info("%s: %s", outcome.kind, outcome.reason)
            command: Command = "finish" if outcome.kind == "finished" else "settle"
            job = await self._store.command(name, command, now=self._clock(), reason=outcome.reason)
            # Still RUNNING: it was resumed before it had paused.
            state = job.state

    def _note_pausing(self, name: str, pausing: bool) -> None:  # noqa: FBT001 - what a store says
        """Known with the event that ends a step: a pause asked for in the step is never missed."""
        (self._pausing.add if pausing else self._pausing.discard)(name)

    async def _fail(self, name: str, reason: str) -> None:
        # Refused where the job has ended, or was paused before it began: then that stands.
        with contextlib.suppress(FailedPrecondition):
            await self._store.command(name, "fail", now=self._clock(), reason=reason)

    def _retry_later(self, name: str) -> None:
        self._retry_at[name] = asyncio.get_running_loop().time() + _RETRY_S


@dataclass(frozen=True)
class Context:
    """A ports.JobContext."""

    _stored: StoredJob
    adapter: str
    pause_requested: Callable[[], bool]

    @property
    def name(self) -> str:
        """Resource name of the job."""
        return self._stored.job.name

    @property
    def spec(self) -> JobSpec:
        """With all tasks."""
        return self._stored.spec

    @property
    def step(self) -> int:
        """Optimizer steps recorded as finished."""
        return self._stored.job.step

    @property
    def last_evaluation_step(self) -> int | None:
        """Step of the newest evaluation recorded."""
        evaluation = self._stored.job.last_evaluation
        return None if evaluation is None else evaluation.step


@dataclass(frozen=True)
class StoreRecorder:
    """A ports.Recorder."""

    _store: JobStore
    _job: str
    _clock: Callable[[], float]
    _note_pausing: Callable[[bool], None]

    async def record(self, happening: Happening) -> None:
        """Store the next event of the job, and take note of whether it is to pause."""
        self._note_pausing(await self._store.record(self._job, happening, now=self._clock()))


def _adapter(stored: StoredJob) -> str:
    project, _ = parse_job(stored.job.name)
    return adapter_name(project, stored.spec.adapter.id)

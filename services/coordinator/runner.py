"""Runs jobs: makes what runs here equal to what the store says should run.

The store decides alone. A pause, a cancel or a new job is a row that changed; whoever writes it
wakes the runner, and a wake-up that got lost costs one poll. What runs when the process ends is
left RUNNING in the store, and the successor goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from rollmesh.errors import (
    CapacityExhausted,
    FailedPrecondition,
    MeshError,
    QuotaExceeded,
    Unavailable,
)
from rollmesh.names import adapter_name, parse_job
from rollmesh.telemetry import log_fields
from services.coordinator.admission import Progress
from services.coordinator.context import Context, StoreRecorder
from services.coordinator.jobs import lora_of, num_versions
from services.coordinator.store import QUEUE, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from services.coordinator.admission import Admission
    from services.coordinator.border import Outcome
    from services.coordinator.fleet.membership import Fleet
    from services.coordinator.lifecycle import Command
    from services.coordinator.ports import JobContext, Recorder, Training
    from services.coordinator.store import GroupStore, JobStore, QueuedJob, StoredJob

log = logging.getLogger(__name__)

_POLL_S = 1.0
_RETRY_S = 2.0
"""A job that could not begin for want of room or of an answer is tried again after this long."""
_MAX_REASON = 2000
_COMMANDS: Mapping[str, Command] = MappingProxyType(
    {"finished": "finish", "paused": "settle", "held": "hold"}
)
"""What follows from the outcome of a loop."""


class Play(Protocol):
    """Runs a job's loop to its outcome; raises MeshError where the job fails."""

    async def __call__(self, context: JobContext, recorder: Recorder) -> Outcome:
        """Run until the job has finished, or was asked to pause and is between two steps."""
        ...


class Runner:
    """The jobs that run in this process.

    Args:
        store: what should run.
        groups: what jobs have sampled for their next steps.
        fleet: what a job waits for.
        training: makes the adapters.
        play: the loop of a job.
        admission: which of them may run.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: JobStore,
        groups: GroupStore,
        fleet: Fleet,
        training: Training,
        play: Play,
        admission: Admission,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._groups = groups
        self._fleet = fleet
        self._training = training
        self._play = play
        self._admission = admission
        self._clock = clock
        self._running: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, Progress] = {}
        self._problems: dict[str, dict[str, str]] = {}
        self._pausing: set[str] = set()
        # Of whom a record has told more than what the queue, which is being read, may say.
        self._told: set[str] = set()
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

    def problems(self, name: str) -> list[str]:
        """What a job that runs here waits for, because it is away."""
        return sorted(self._problems.get(name, {}).values())

    async def _reconcile(self, tasks: asyncio.TaskGroup) -> None:
        self._told.clear()
        queue = await self._store.queue()
        wanted = {job.name for job in queue}
        pausing = {job.name for job in queue if job.phase == "PAUSING"}
        self._pausing = (pausing - self._told) | (self._pausing & self._told)
        self._retry_at = {name: at for name, at in self._retry_at.items() if name in wanted}
        for name, task in self._running.items():
            # Once: a second time would cut off its cleaning up.
            if name not in wanted and not task.cancelling():
                task.cancel()
        await self._settle([job for job in queue if job.phase == "PAUSING"])
        time = asyncio.get_running_loop().time()
        verdicts = await self._admission.decide(
            [job for job in queue if job.phase != "PAUSING" or job.name in self._running],
            {name: self._progress.get(name) for name in self._running},
            {
                job.name: job.state_reason or "it is tried again"
                for job in queue
                if self._retry_at.get(job.name, 0.0) > time
            },
            now=self._clock(),
        )
        known = {job.name: job.state_reason for job in queue}
        for verdict in verdicts:
            name = verdict.job.name
            if verdict.start:
                self._start(name, tasks)
            elif verdict.reason != known[name]:
                await self._store.explain(name, verdict.reason, now=self._clock())

    async def _settle(self, pausing: Sequence[QueuedJob]) -> None:
        for job in pausing:
            if job.name not in self._running:  # The process that ran it ended first.
                with contextlib.suppress(FailedPrecondition):  # Its user was faster.
                    await self._store.command(job.name, "settle", now=self._clock())

    def _start(self, name: str, tasks: asyncio.TaskGroup) -> None:
        task = tasks.create_task(self._run(name))
        self._running[name] = task
        task.add_done_callback(lambda _: self._ended(name))

    def _ended(self, name: str) -> None:
        del self._running[name]
        self._progress.pop(name, None)
        self._problems.pop(name, None)
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
        except (CapacityExhausted, QuotaExceeded, Unavailable) as error:
            await self._store.explain(name, f"waits: {error}", now=self._clock())
            self._retry_later(name)
            return False
        await self._store.command(name, "start", now=self._clock())
        self._admission.started(name, self._clock())
        return True

    async def _play_to_the_end(self, name: str) -> None:
        state = "RUNNING"
        while state == "RUNNING":
            stored = await self._store.load(name)
            self._problems[name] = {}
            context = Context(
                stored,
                self._groups,
                _adapter(stored),
                lambda: name in self._pausing,
                self._problems[name],
            )
            recorder = StoreRecorder(
                self._store, self._groups, name, self._clock, partial(self._note_pausing, name)
            )
            self._progress[name] = Progress(self._clock(), context.step, stored.spec.stop.max_steps)
            with log_fields(adapter=context.adapter):
                log.info("runs from step %d", context.step)
                outcome = await self._play(context, recorder)
                log.info("%s: %s", outcome.kind, outcome.reason)
            command = _COMMANDS[outcome.kind]
            job = await self._store.command(name, command, now=self._clock(), reason=outcome.reason)
            # Still RUNNING: it was resumed before it had paused.
            state = job.state

    def _note_pausing(self, name: str, pausing: bool) -> None:  # noqa: FBT001 - what a store says
        """Known with the event that ends a step: a pause asked for in the step is never missed."""
        (self._pausing.add if pausing else self._pausing.discard)(name)
        self._told.add(name)

    async def _fail(self, name: str, reason: str) -> None:
        # Refused where the job has ended, or was paused before it began: then that stands.
        with contextlib.suppress(FailedPrecondition):
            await self._store.command(name, "fail", now=self._clock(), reason=reason)

    def _retry_later(self, name: str) -> None:
        self._retry_at[name] = asyncio.get_running_loop().time() + _RETRY_S


def _adapter(stored: StoredJob) -> str:
    project, _ = parse_job(stored.job.name)
    return adapter_name(project, stored.spec.adapter.id)

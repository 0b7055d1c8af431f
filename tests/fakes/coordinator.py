"""A whole coordinator over gRPC in this process, on a mesh of fakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rollmesh.client import Client
from rollmesh.job import JobSpec, StateChanged, StepCompleted
from services.coordinator.assembly import coordinator
from services.coordinator.border import Outcome
from services.coordinator.config import CoordinatorConfig
from services.coordinator.store import open_store
from tests.fakes.mesh import BASE_MODEL, FakeReward, FakeSampler, FakeTokenizer, FakeTrainer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from rollmesh.job import JobState
    from services.coordinator.makers import Peers
    from services.coordinator.ports import JobContext, Recorder
    from services.coordinator.runner import Play
    from services.coordinator.store import Store

PROJECT = "projects/p"


def spec_of(**changes: Any) -> JobSpec:
    """A small job for the fakes."""
    fields = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(3)]
    values = {
        "base_model": BASE_MODEL,
        "dataset": {"tasks": [{"fields": each} for each in fields]},
        "prompt": {"text": "{question}="},
        "reward": {"function": "even", "reference": "{answer}"},
        "stop": {"max_steps": 3},
    }
    return JobSpec.model_validate({**values, **changes})


class Script:
    """Loops that take a step for each time that the test says so, and fail when it says so."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []  # job and the step it began at
        self.stopped: list[str] = []
        self._changed = asyncio.Condition()
        self._go: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(0))
        self._failures: dict[str, Exception] = {}

    def step(self, job: str, count: int = 1) -> None:
        """Let `job` take so many more steps."""
        for _ in range(count):
            self._go[job].release()

    def fail(self, job: str, error: Exception) -> None:
        """Let `job` fail at its next step."""
        self._failures[job] = error
        self.step(job)

    async def until_started(self, *jobs: str) -> None:
        """Return once these loops have started, all in all, and in this order."""
        await self._until(lambda: [job for job, _ in self.started] == list(jobs))

    async def until_stopped(self, *jobs: str) -> None:
        """Return once these loops have stopped, all in all, and in this order."""
        await self._until(lambda: self.stopped == list(jobs))

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(holds)

    async def __call__(self, context: JobContext, recorder: Recorder) -> Outcome:
        job, step = context.name.rpartition("/")[2], context.step
        async with self._changed:
            self.started.append((job, step))
            self._changed.notify_all()
        try:
            while step < context.spec.stop.max_steps:
                if context.pause_requested():
                    return Outcome("paused", f"paused after step {step}")
                await self._go[job].acquire()
                if job in self._failures:
                    raise self._failures[job]
                step += 1
                await recorder.record(
                    StepCompleted(step=step, policy_version=step, metrics={"m": step}, phases={})
                )
            return Outcome("finished", "all steps are done")
        finally:
            async with self._changed:
                self.stopped.append(job)
                self._changed.notify_all()


@dataclass
class Fakes:
    """What the coordinator talks to; outlives the coordinator."""

    trainers: dict[str, FakeTrainer] = field(default_factory=lambda: {"t:1": FakeTrainer()})
    samplers: dict[str, FakeSampler] = field(default_factory=lambda: {"s:1": FakeSampler()})
    reward: FakeReward = field(default_factory=FakeReward)
    script: Script = field(default_factory=Script)

    def __post_init__(self) -> None:
        shared: dict[str, Any] = {}  # the blob store of the mesh
        for trainer in self.trainers.values():
            trainer.snapshots = shared

    @property
    def trainer(self) -> FakeTrainer:
        """The only one."""
        (trainer,) = self.trainers.values()
        return trainer

    @property
    def sampler(self) -> FakeSampler:
        """The only one."""
        (sampler,) = self.samplers.values()
        return sampler


@dataclass(frozen=True)
class Coordinator:
    """One that runs, and a client of it."""

    client: Client
    store: Store
    port: int

    async def until(self, job: str, *states: JobState) -> str:
        """Return once the job has come to one of `states` in its life; the reason."""
        watched = self.client.jobs.watch(f"{PROJECT}/jobs/{job}")
        async with asyncio.timeout(20), contextlib.aclosing(watched) as events:
            async for event in events:
                changed = event.event
                if isinstance(changed, StateChanged) and changed.to_state in states:
                    return changed.reason
        raise AssertionError(f"{job} ended without being {states}")

    async def until_step(self, job: str, step: int) -> None:
        """Return once the job has finished that step."""
        watched = self.client.jobs.watch(f"{PROJECT}/jobs/{job}")
        async with asyncio.timeout(20), contextlib.aclosing(watched) as events:
            async for event in events:
                if isinstance(event.event, StepCompleted) and event.event.step == step:
                    return
        raise AssertionError(f"{job} ended before step {step}")

    async def until_reason(self, job: str, part: str) -> None:
        """Return once the job says that it waits for `part`, which is no event."""

        async def says_so() -> bool:
            return part in (await self.client.jobs.get(f"{PROJECT}/jobs/{job}")).state_reason

        await eventually(says_so)

    async def until_served(self) -> None:
        """Return once every member serves."""

        async def all_serve() -> bool:
            return all(member.serving for member in (await self.client.fleet.get()).members)

        await eventually(all_serve)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return once `holds`: for what tells nobody when it changes."""
    async with asyncio.timeout(20):
        while not await holds():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running_coordinator(
    folder: Path,
    fakes: Fakes,
    *,
    play: Callable[[Peers], Play] | None = None,
    **settings: Any,
) -> AsyncIterator[Coordinator]:
    """A coordinator with its store in `folder`, which a second one may be started on."""
    config = CoordinatorConfig.model_validate(
        {
            "listen": "127.0.0.1:0",
            "state_dir": folder,
            "trainers": [*fakes.trainers],
            "samplers": [*fakes.samplers],
            "reward": "r:1",
            "base_models": [{"name": BASE_MODEL}],
            **settings,
        }
    )
    async with (
        open_store(config.database_url, request_retention_s=config.request_retention_s) as store,
        coordinator(
            config,
            store,
            trainers=fakes.trainers,
            samplers=fakes.samplers,
            reward=fakes.reward,
            environments=fakes.reward.environments,
            load_tokenizer=lambda _: FakeTokenizer(),
            play=play or (lambda _: fakes.script),
        ) as server,
        Client(f"127.0.0.1:{server.port}") as client,
    ):
        yield Coordinator(client, store, server.port)

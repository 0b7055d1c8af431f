"""Fleets in virtual time: waiting until one is as a test needs it; the sampling core over one."""

from __future__ import annotations

import asyncio
import contextlib

from rollmesh.types import AdapterSource, SamplingParams
from services.coordinator.fleet.static import StaticFleet
from services.coordinator.sampling import FleetSampling
from services.coordinator.scheduler import Projects, Scheduler

SOURCE = AdapterSource("projects/p/adapters/a", 3, "d3", "trainer")
PARAMS = SamplingParams(seed=7)
PROMPT = [1, 2]


async def until(fleet, ready):
    """Return once `ready()`, which is asked now and after every change of `fleet`."""
    changed = asyncio.Event()
    fleet.on_change(changed.set)
    while not ready():
        changed.clear()
        await changed.wait()


class SamplingWorld:
    """FleetSampling over fake samplers s0, s1, …; `losses` is what jobs heard."""

    def __init__(
        self,
        *samplers,
        bound=8,
        queue=100,
        locate=lambda source: source,
        begin=0.0,
        **policies,
    ):
        """`policies`: ProjectPolicy by project, where one has its own. `begin`: Unix seconds."""
        self.samplers = samplers
        for number, sampler in enumerate(samplers):
            sampler.name = f"s{number}"
        self.fleet = StaticFleet(
            trainers={}, samplers={sampler.name: sampler for sampler in samplers}, rewards={}
        )
        self.scheduler = Scheduler(
            max_running_completions=bound,
            max_queued_requests=queue,
            projects=Projects(by_id=policies),
            prompt_token_price=1.0,
        )
        self.sampling = FleetSampling(
            self.fleet,
            self.scheduler,
            locate=locate,
            new_seed=lambda: 1234,
            clock=self.now,
        )
        self.losses: list[str] = []
        self.begin = begin

    def now(self):
        return self.begin + asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def running(self):
        """The fleet is polled; in the end nothing may be left of any request."""
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(self.fleet.run())
            alive = sum(sampler.alive for sampler in self.samplers)
            await until(self.fleet, lambda: len(self.serving) == alive)
            yield tasks
            polling.cancel()
        assert self.scheduler.num_queued == 0
        assert [self.scheduler.outstanding(s.name) for s in self.samplers] == [
            0 for _ in self.samplers
        ]
        assert [self.scheduler.outstanding_tokens(s.name) for s in self.samplers] == [
            0 for _ in self.samplers
        ]
        assert [sampler.running for sampler in self.samplers] == [0 for _ in self.samplers]

    @property
    def serving(self):
        return [member.address for member in self.fleet.samplers("tiny")]

    def problem(self, name):
        members = self.fleet.snapshot(0).members
        return next(member.problem for member in members if member.address == name)

    async def sample(
        self, count=2, params=PARAMS, project="p", source=SOURCE, newest=None, **options
    ):
        return await self.sampling.sample(
            project,
            "tiny",
            source,
            PROMPT,
            count,
            params,
            lost=self._lost,
            newest=newest,
            **options,
        )

    async def _lost(self, problem):
        self.losses.append(problem)

    def stream(self, count=2, params=PARAMS, project="p", **options):
        return self.sampling.stream(project, "tiny", SOURCE, PROMPT, count, params, **options)

    async def collected(self, count=2, **options):
        return [chunk async for chunk in self.stream(count, **options)]


async def at(seconds, action):
    """Do something then, by the event loop's clock."""
    await asyncio.sleep(seconds - asyncio.get_running_loop().time())
    action()

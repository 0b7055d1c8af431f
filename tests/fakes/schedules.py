"""Random small meshes with random troubles, and a judge of what came of them.

The judge goes by what samplers and trainers saw, and counts everything itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from random import Random

from services.coordinator.scheduler import ProjectPolicy, Projects, Request
from services.coordinator.simulation.calibration import Calibration
from services.coordinator.simulation.jobs import JobModel, Lengths
from services.coordinator.simulation.policies import Product
from services.coordinator.simulation.trace import Begun, Drawn, Marked, Trace, Trained
from services.coordinator.simulation.world import World

DAY_S = 86400
BOUND = 4
MAX_DAYS = 60

CALIBRATION = Calibration(
    machine="a toy",
    sources={},
    decode_tokens_per_s=[(1, 20.0), (8, 80.0)],
    prefill_s_per_token=0.001,
    load_s=0.2,
    train_s_per_token=0.005,
    train_step_s=0.1,
    fused_tokens=300,
    max_running_completions=BOUND,
)


@dataclass(frozen=True)
class Schedule:
    """A mesh that has run. `policies` by project."""

    world: World
    trace: Trace
    jobs: dict[str, JobModel]
    policies: dict[str, ProjectPolicy]
    max_running_jobs: int


def random_schedule(seed: int, *, new_policy=None) -> Schedule:
    """A mesh of a few jobs whose samplers, trainers and coordinator are disturbed at random."""
    random = Random(seed)
    policies = {f"p{number}": _policy(random) for number in range(random.randint(1, 3))}
    projects = Projects(ProjectPolicy(), policies)
    jobs = {job.name: job for job in _jobs(random, list(policies))}
    max_running_jobs = random.choice([1, 2, 8])

    def product() -> Product:
        return Product(
            max_running_completions=BOUND,
            max_queued_requests=1000,
            projects=projects,
            prompt_token_price=0.25,
        )

    world = World(
        jobs.values(),
        num_samplers=random.randint(1, 3),
        num_trainers=random.randint(1, 2),
        calibration=CALIBRATION,
        new_policy=new_policy or product,
        projects=projects,
        max_running_jobs=max_running_jobs,
        seed=seed,
    )
    _troubles(world, random)
    return Schedule(world, world.run(MAX_DAYS * DAY_S), jobs, policies, max_running_jobs)


def _policy(random: Random) -> ProjectPolicy:
    return ProjectPolicy(
        weight=random.choice([0.5, 1.0, 2.0, 4.0]),
        max_priority=1,
        max_running_jobs=random.choice([None, None, 1, 2]),
        max_tokens_in_flight=random.choice([None, None, 50, 200, 500]),
        tokens_per_day=random.choice([None, None, None, 200, 1000]),
    )


def _jobs(random: Random, projects: list[str]) -> list[JobModel]:
    return [
        JobModel(
            f"j{number}",
            random.choice(projects),
            steps=random.randint(1, 3),
            groups_per_step=random.randint(1, 3),
            group_size=random.randint(1, 2),
            prompt_tokens=random.randint(0, 40),
            lengths=random.choice(
                [Lengths("uniform", 1, 40, 40), Lengths("lognormal", 10, 100, 120)]
            ),
            reward_s=random.choice([0.0, 0.2, 3.0]),
            max_staleness=random.randint(0, 3),
            priority=random.choice([-1, 0, 0, 0, 1]),
            submitted_s=random.choice([0.0, random.uniform(0, 10)]),
        )
        for number in range(random.randint(1, 3))
    ]


def _troubles(world: World, random: Random) -> None:
    for _ in range(random.randint(0, 6)):
        at = random.uniform(0, 15)
        kind = random.choice(["sampler", "sampler", "restart", "trainer"])
        if kind == "sampler":
            address = random.choice(world.samplers)
            world.clock.at(at, lambda address=address: world.sampler_dies(address))
            back = at + random.uniform(0.1, 5)
            world.clock.at(back, lambda address=address: world.sampler_returns(address))
        elif kind == "restart":
            world.clock.at(at, world.coordinator_restarts)
        else:
            seconds = random.uniform(0.1, 5)
            world.clock.at(at, lambda seconds=seconds: world.trainer_pauses(seconds))


def faults(schedule: Schedule) -> list[str]:
    """What is wrong with it; empty: nothing."""
    judge = _Judge(schedule)
    for happened in schedule.trace.happened:
        judge.see(happened)
    judge.end()
    return judge.found


class _Judge:
    def __init__(self, schedule: Schedule) -> None:
        self.found: list[str] = []
        self._schedule = schedule
        self._running: dict[str, set[str]] = defaultdict(set)
        self._ended: set[str] = set()
        self._steps: Counter[str] = Counter()
        self._scored: Counter[tuple[str, int]] = Counter()
        self._trained: Counter[tuple[str, int]] = Counter()
        self._used: Counter[tuple[str, int]] = Counter()
        # By request: its project and what is left of it: completions, and the tokens it counts.
        self._in_flight: dict[int, tuple[object, int, str]] = {}
        self._waiting: dict[int, Request] = {}
        self._down: set[str] = set()

    def see(self, happened: object) -> None:
        match happened:
            case Begun():
                self._begun(happened)
            case Drawn():
                self._drawn(happened)
            case Trained():
                self._step(happened)
            case Marked():
                self._marked(happened)

    def end(self) -> None:
        for name, job in self._schedule.jobs.items():
            self._claim(name in self._ended, f"{name} starves")
            numbers = range(job.steps * job.groups_per_step)
            once = Counter({(name, number): 1 for number in numbers})
            of_job = {key: count for key, count in self._trained.items() if key[0] == name}
            scored = {key: count for key, count in self._scored.items() if key[0] == name}
            self._claim(of_job == once, f"{name}: trained {of_job}")
            self._claim(scored == once, f"{name}: finished {scored}")

    def _claim(self, holds, otherwise: str) -> None:
        if not holds:
            self.found.append(otherwise)

    def _policy(self, project: str) -> ProjectPolicy:
        return self._schedule.policies[project]

    def _day_used_up(self, project: str, day: int) -> bool:
        allowed = self._policy(project).tokens_per_day
        return allowed is not None and self._used[project, day] >= allowed

    def _marked(self, marked: Marked) -> None:
        subject = marked.subject
        match marked.what:
            case "started":
                project = self._schedule.jobs[subject].project
                goes_on = subject in self._running[project]
                self._running[project].add(subject)
                allowed = self._policy(project).max_running_jobs
                count = len(self._running[project])
                self._claim(allowed is None or count <= allowed, f"{count} jobs of {project} run")
                day = int(marked.time // DAY_S)
                total = sum(
                    len(jobs)
                    for project, jobs in self._running.items()
                    if not self._day_used_up(project, day)
                )
                within = total <= self._schedule.max_running_jobs
                self._claim(goes_on or within, f"{total} jobs run")
            case "ended":
                self._running[self._schedule.jobs[subject].project].remove(subject)
                self._ended.add(subject)
            case "scored":
                self._scored[subject, marked.number] += 1
            case "waiting":
                assert marked.request
                self._waiting[marked.number] = marked.request
            case "restart":
                self._claim(not self._in_flight, "drawn for a coordinator that is gone")
                self._waiting.clear()
            case "sampler_down":
                self._down.add(subject)
            case "sampler_up":
                self._down.remove(subject)

    def _begun(self, begun: Begun) -> None:
        request = begun.request
        project, policy = request.project, self._policy(request.project)
        self._claim(begun.address not in self._down, f"{begun.address} is down")
        there = sum(
            left for _, left, address in self._in_flight.values() if address == begun.address
        )
        self._claim(there < BOUND, f"{there} completions on {begun.address}, and one more request")
        del self._waiting[request.id]
        self._in_order(request)
        if not any(
            one.max_tokens_in_flight or one.tokens_per_day
            for one in self._schedule.policies.values()
        ):
            higher = [one.id for one in self._waiting.values() if one.priority > request.priority]
            self._claim(not higher, f"{request.id} goes before {higher}, of a higher class")
        day = project, int(begun.time // DAY_S)
        if not request.resumed:
            allowed = policy.tokens_per_day
            used = self._used[day]
            self._claim(allowed is None or used < allowed, f"{project} used {used} of {allowed}")
            self._used[day] += request.num_prompt_tokens
        self._in_flight[request.id] = (request, request.num_completions, begun.address)
        held = [
            one.num_prompt_tokens + left * one.max_tokens
            for one, left, _ in self._in_flight.values()
            if one.project == project
        ]
        allowed = policy.max_tokens_in_flight
        fits = allowed is None or sum(held) <= allowed or len(held) == 1
        self._claim(fits, f"{project} has {held} tokens in flight, of {allowed}")

    def _in_order(self, request: Request) -> None:
        """Within a class of its project nobody waits for more than those who came before it.

        Who was stopped goes first: it came before all that have had no place.
        """
        turn = not request.resumed, request.id
        overtaken = [
            one.id
            for one in self._waiting.values()
            if (one.project, one.priority) == (request.project, request.priority)
            and (not one.resumed, one.id) < turn
        ]
        self._claim(not overtaken, f"{request.id} overtakes {overtaken}, of its project and class")

    def _drawn(self, drawn: Drawn) -> None:
        request, left, address = self._in_flight[drawn.request.id]
        self._used[request.project, int(drawn.time // DAY_S)] += drawn.num_tokens
        self._in_flight[request.id] = (request, left - drawn.num_finished, address)
        if drawn.left:
            del self._in_flight[request.id]

    def _step(self, trained: Trained) -> None:
        job = self._schedule.jobs[trained.job]
        self._claim(trained.step == self._steps[job.name], f"{job.name}: step {trained.step}")
        self._steps[job.name] += 1
        first = trained.step * job.groups_per_step
        numbers = [number for number, _ in trained.groups]
        expected = list(range(first, first + job.groups_per_step))
        self._claim(numbers == expected, f"{job.name}: {numbers} in step {trained.step}")
        for number, version in trained.groups:
            self._trained[job.name, number] += 1
            staleness = trained.step - version
            ok = 0 <= staleness <= job.max_staleness
            self._claim(ok, f"{job.name}: group {number} is {staleness} versions old")

"""Which jobs of the store's queue begin, and what is told of the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from services.coordinator.admission import SPREAD, Admission, Progress
from services.coordinator.scheduler import ProjectPolicy, Projects, Scheduler
from services.coordinator.store import QueuedJob

NOW = 1000.0


class Fleet:
    """Has a trainer and a sampler of each model, but for what is `missing`."""

    def __init__(self):
        self.missing = set()

    def base_models(self):
        return ["big", "tiny"]

    def trainers(self, base_model):
        return [] if ("trainer", base_model) in self.missing else ["t"]

    def samplers(self, base_model):
        return [] if ("sampler", base_model) in self.missing else ["s"]


class World:
    def __init__(self, *, max_running=2, adapters=None, **policies):
        self.fleet = Fleet()
        projects = Projects(by_id=policies)
        self.scheduler = Scheduler(
            max_running_completions=1,
            max_queued_requests=1,
            projects=projects,
            prompt_token_price=1.0,
        )
        held = adapters or {}

        async def counts():
            return held

        self.admission = Admission(
            self.fleet,
            projects,
            self.scheduler,
            SimpleNamespace(counts=counts),
            max_running=max_running,
        )

    async def decide(self, *queue, running=None, retries=None, now=NOW):
        """Names of those that begin; the others' rules by name."""
        verdicts = await self.admission.decide(queue, running or {}, retries or {}, now=now)
        begin = [verdict.job.name for verdict in verdicts if verdict.start]
        return begin, {verdict.job.name: verdict.rule for verdict in verdicts if not verdict.start}


def job(
    name, project="p", *, phase="PENDING", step=0, has_adapter=False, needs_sampler=True, **changes
):
    values = {"base_model": "tiny", "state_reason": "", "priority": "normal", "create_time": 1.0}
    return QueuedJob(
        name=f"projects/{project}/jobs/{name}",
        project=project,
        phase=phase,
        step=step,
        has_adapter=has_adapter,
        needs_sampler=needs_sampler,
        **{**values, **changes},
    )


def named(*names, project="p"):
    return [f"projects/{project}/jobs/{name}" for name in names]


async def test_jobs_begin_in_their_order_and_the_rest_are_told_their_places():
    world = World()
    begin, rules = await world.decide(job("a"), job("b"), job("c"), job("d"))
    assert begin == named("a", "b")
    assert rules == dict.fromkeys(named("c", "d"), "MAX_RUNNING_JOBS")
    statuses = [world.admission.status(name) for name in named("a", "c", "d")]
    assert [status and status.position for status in statuses] == [None, 1, 2]
    told = world.admission.waiting("p")
    assert [waiting.subject for waiting in told] == named("c", "d")
    assert told[1].ahead == tuple(named("c"))
    assert world.admission.waiting("q") == []


async def test_a_higher_class_goes_first_and_a_project_over_its_quota_holds_up_no_other():
    world = World(max_running=3, p=ProjectPolicy(max_running_jobs=1))
    queue = [job("a"), job("b", priority="high"), job("c"), job("x", "q")]
    begin, rules = await world.decide(*queue)
    assert begin == [*named("b"), *named("x", project="q")]
    assert rules == dict.fromkeys(named("a", "c"), "PROJECT_RUNNING_JOBS")


@pytest.mark.parametrize("part", ["trainer", "sampler"])
async def test_a_job_waits_for_what_its_base_model_lacks(part):
    world = World(max_running=1)
    world.fleet.missing = {(part, "big")}
    begin, rules = await world.decide(job("a", base_model="big"), job("b"))
    assert (begin, rules) == (named("b"), {named("a")[0]: f"NO_{part.upper()}"})
    assert f"no {part} of 'big'" in world.admission.status(named("a")[0]).reason


async def test_a_job_that_needs_one_more_adapter_than_there_may_be_waits_and_others_go_on():
    world = World(max_running=9, adapters={"p": 2}, p=ProjectPolicy(max_adapters=3))
    queue = [job("a"), job("b"), job("has", has_adapter=True), job("x", "q")]
    begin, rules = await world.decide(*queue)
    assert begin == [*named("a"), *named("x", project="q"), *named("has")]
    assert rules == {named("b")[0]: "PROJECT_ADAPTERS"}
    assert "3 of 3 adapters" in world.admission.status(named("b")[0]).reason


async def test_a_job_that_is_tried_again_later_says_why_and_holds_up_nobody():
    world = World(max_running=1)
    begin, rules = await world.decide(
        job("a"), job("b"), retries={named("a")[0]: "every trainer is full"}
    )
    assert (begin, rules) == (named("b"), {named("a")[0]: "RETRY"})
    assert world.admission.status(named("a")[0]).reason == "every trainer is full"


async def test_what_ran_before_a_restart_goes_first_and_over_every_quota():
    world = World(
        max_running=2,
        adapters={"p": 9},
        p=ProjectPolicy(max_running_jobs=1, max_adapters=1, tokens_per_day=1),
    )
    world.scheduler.restore_usage("p", int(NOW // 86400), 5)
    ran = [job(name, phase="RUNNING", has_adapter=True) for name in ("a", "b")]
    begin, rules = await world.decide(*ran, job("x", "q", priority="high"))
    assert begin == [*named("a", "b"), *named("x", project="q")], "they draw nothing today"
    assert rules == {}


async def test_what_ran_before_a_restart_keeps_its_place_while_its_sampler_is_away():
    world = World(max_running=1)
    world.fleet.missing = {("sampler", "tiny")}
    ran = job("a", phase="RUNNING")
    begin, rules = await world.decide(ran, job("b", base_model="big"))
    assert begin == []
    assert rules == {
        named("a")[0]: "NO_SAMPLER",
        named("b")[0]: "MAX_RUNNING_JOBS",
    }


async def test_a_job_that_is_cancelled_has_its_place_until_it_has_cleaned_up():
    world = World(max_running=1)
    begin, _ = await world.decide(job("b"), running={named("a")[0]: None})
    assert begin == []
    begin, _ = await world.decide(job("b"))
    assert begin == named("b")


async def test_the_eta_goes_by_the_steps_that_the_running_jobs_took():
    world = World(max_running=2)
    running = {
        named("a")[0]: Progress(since=NOW - 100, from_step=10, max_steps=50),
        named("b")[0]: Progress(since=NOW - 100, from_step=0, max_steps=200),
    }
    queue = [
        job("a", phase="RUNNING", step=20),  # 10 s a step, 30 are left
        job("b", phase="RUNNING", step=100),  # 1 s a step, 100 are left
        job("c"),
        job("d"),
        job("e"),
    ]
    await world.decide(*queue, running=running)
    first, second, third = (world.admission.status(name) for name in named("c", "d", "e"))
    assert first.eta_low_s == pytest.approx(100 / SPREAD)
    assert first.eta_high_s == pytest.approx(100 * SPREAD)
    assert second.eta_low_s == pytest.approx(300 / SPREAD)
    assert second.eta_high_s == pytest.approx(300 * SPREAD)
    assert (third.eta_low_s, third.eta_high_s) == (None, None)


async def test_before_its_first_step_nothing_is_said_of_when_a_job_ends():
    world = World(max_running=1)
    running = {named("a")[0]: Progress(since=NOW - 100, from_step=10, max_steps=50)}
    await world.decide(job("a", phase="RUNNING", step=10), job("b"), running=running)
    status = world.admission.status(named("b")[0])
    assert (status.eta_low_s, status.eta_high_s) == (None, None)


async def test_what_began_is_a_decision_of_its_project_alone():
    world = World(max_running=1)
    world.admission.started(named("a")[0], NOW)
    (decision,) = world.scheduler.explain("p", "", NOW).decisions
    assert (decision.subject, decision.action) == (named("a")[0], "STARTED")
    assert world.scheduler.explain("q", "", NOW).decisions == ()

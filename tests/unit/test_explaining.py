"""What ExplainSchedule answers of jobs, requests, decisions, shares and quotas."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from rollmesh import types
from rollmesh.errors import InvalidRequest, NotFound
from services.coordinator.explaining import MAX_WAITING, Explaining
from services.coordinator.scheduler import ProjectPolicy, Projects
from tests.fakes.fleet import SamplingWorld
from tests.fakes.samplers import FakeSampler
from tests.fakes.virtual_time import simulate

JOB = "projects/p/jobs/j"
WAITS = types.Waiting(JOB, "MAX_RUNNING_JOBS", "2 jobs run", "the end of one", 1, 5.0)


class Around(SimpleNamespace):
    """What explaining asks beside the scheduler: jobs that wait, and what there is."""

    jobs_that_wait: tuple = ()

    def waiting(self, project):
        return [
            job for job in self.jobs_that_wait if job.subject.startswith(f"projects/{project}/")
        ]

    def num_running(self, project):
        return {"p": 2}.get(project, 0)

    async def get(self, name):
        if name != JOB:
            raise NotFound(f"there is no {name}")

    async def count(self, project):
        return {"p": 3}.get(project, 0)


def explaining(world, *jobs, policies=None):
    around = Around(jobs_that_wait=jobs)
    projects = Projects(by_id=policies or {})
    return Explaining(world.scheduler, around, around, around, projects, clock=world.now)


def test_jobs_come_before_requests_and_each_says_why_it_waits():
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1)
        core = explaining(world, WAITS)
        async with world.running() as tasks:
            calls = [tasks.create_task(world.sample(1, job=JOB)) for _ in range(3)]
            calls.append(tasks.create_task(world.sample(1, project="q")))
            await asyncio.sleep(0.5)
            told = await core.explain("projects/p", "")
            assert told.num_waiting == 3
            assert told.waiting[0] == WAITS
            assert [waiting.job for waiting in told.waiting[1:]] == [JOB, JOB]
            assert all(
                waiting.rule and waiting.reason and waiting.release for waiting in told.waiting
            )
            assert told.waiting[2].ahead == (told.waiting[1].subject,)
            (decision,) = told.decisions
            assert (decision.action, decision.address) == ("ASSIGNED", "s0")
            (share,) = told.shares
            assert (share.num_queued, share.num_running, share.entitled) == (2, 1, 0.5)
            await asyncio.gather(*calls)

    simulate(scenario())


def test_quotas_are_told_used_and_allowed():
    async def scenario():
        policy = ProjectPolicy(max_running_jobs=4, tokens_per_day=1000)
        world = SamplingWorld(FakeSampler(), p=policy)
        core = explaining(world, policies={"p": policy})
        async with world.running():
            await world.sample(2)
            told = await core.explain("projects/p", "")
            assert told.quotas == (
                types.Quota("running_jobs", 2, 4),
                types.Quota("adapters", 3, None),
                types.Quota("tokens_in_flight", 0, None),
                types.Quota("tokens_per_day", 12, 1000),
            )

    simulate(scenario())


def test_a_subject_is_a_job_with_its_requests_or_one_request():
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1)
        core = explaining(world, WAITS)
        async with world.running() as tasks:
            calls = [tasks.create_task(world.sample(1)) for _ in range(2)]
            calls.append(tasks.create_task(world.sample(1, job=JOB)))
            await asyncio.sleep(0.5)
            of_job = await core.explain("projects/p", JOB)
            assert [waiting.job for waiting in of_job.waiting] == ["", JOB]
            assert of_job.decisions == ()
            request = of_job.waiting[1].subject
            (waiting,) = (await core.explain("projects/p", request)).waiting
            assert waiting.subject == request
            # It was assigned, or never was: nothing is kept of a request that is not waiting.
            assert (await core.explain("projects/p", "projects/p/requests/99")).waiting == ()
            await asyncio.gather(*calls)

    simulate(scenario())


def test_no_more_are_told_than_the_bound_and_all_are_counted():
    async def scenario():
        world = SamplingWorld(FakeSampler(token_s=0.01), bound=1, queue=500)
        core = explaining(world, WAITS)
        async with world.running() as tasks:
            calls = [tasks.create_task(world.sample(1)) for _ in range(300)]
            await asyncio.sleep(0.005)
            told = await core.explain("projects/p", "")
            assert len(told.waiting) == MAX_WAITING
            assert told.num_waiting == 300
            await asyncio.gather(*calls)
            assert len((await core.explain("projects/p", "")).decisions) == 100

    simulate(scenario())


def test_names_of_other_projects_appear_nowhere():
    async def scenario():
        world = SamplingWorld(FakeSampler(), bound=1)
        core = explaining(world, WAITS)
        async with world.running() as tasks:
            calls = [
                tasks.create_task(world.sample(1, project=project, priority=priority))
                for project in ("hidden", "p", "secret")
                for priority in ("low", "normal", "high")
            ]
            await asyncio.sleep(2.5)
            told = await core.explain("projects/p", "")
            assert told.num_waiting == 4
            assert "hidden" not in repr(told)
            assert "secret" not in repr(told)
            assert "projects/p/requests/" not in repr(await core.explain("projects/secret", ""))
            await asyncio.gather(*calls)

    simulate(scenario())


@pytest.mark.parametrize(
    ("project", "subject", "field"),
    [
        ("p", "", "project"),
        ("projects/P", "", "project"),
        ("projects/p", "j", "subject"),
        ("projects/p", "projects/p/adapters/a", "subject"),
        ("projects/p", "projects/p/requests/one", "subject"),
        ("projects/p", "projects/p/requests/1/2", "subject"),
        ("projects/p", "projects/q/requests/1", "subject"),
        ("projects/p", "projects/q/jobs/j", "subject"),
    ],
)
async def test_names_that_are_none_or_another_projects_are_refused(project, subject, field):
    core = explaining(SamplingWorld(FakeSampler()))
    with pytest.raises(InvalidRequest) as caught:
        await core.explain(project, subject)
    assert caught.value.context["field"] == field


async def test_a_job_that_there_is_not_is_not_found():
    core = explaining(SamplingWorld(FakeSampler()))
    assert (await core.explain("projects/p", JOB)).waiting == ()
    with pytest.raises(NotFound):
        await core.explain("projects/p", "projects/p/jobs/other")

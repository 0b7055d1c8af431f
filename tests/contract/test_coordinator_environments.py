"""Jobs in environments as their users see them, over gRPC, with fakes around the coordinator."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from rollmesh.errors import InvalidRequest, NotFound, Unavailable
from rollmesh.job import JobSpec, Warned
from services.coordinator.play import playing
from tests.fakes.coordinator import PROJECT, Fakes, eventually, running_coordinator, spec_of

J = f"{PROJECT}/jobs/j"


@pytest.fixture
def fakes():
    return Fakes()


@pytest.fixture
async def mesh(tmp_path, fakes):
    async with running_coordinator(tmp_path, fakes, play=playing) as running:
        yield running


def in_world(**changes) -> JobSpec:
    values = {
        "environment": {"name": "world"},
        "dataset": {"split": "train"},
        "algorithm": {"group_size": 2, "groups_per_step": 2},
        "stop": {"max_steps": 2},
    }
    base = spec_of().model_dump(exclude_unset=True, exclude={"dataset", "prompt", "reward"})
    return JobSpec.model_validate({**base, **values, **changes})


async def test_a_job_in_an_environment_trains_and_is_evaluated_there(mesh):
    spec = in_world(evaluation={"dataset": {"split": "heldout"}, "max_tasks": 4})
    await mesh.client.jobs.create(PROJECT, spec, "j")
    assert await mesh.until("j", "SUCCEEDED") == "all 2 steps are done"
    job = await mesh.client.jobs.get(J)
    assert job.spec.environment.name == "world"
    assert job.last_evaluation.num_tasks == 4
    assert job.metrics["turns_mean"] >= 1
    assert job.problems == []


@pytest.mark.parametrize(
    ("changes", "error", "field", "says"),
    [
        pytest.param(
            {"environment": {"name": "moon"}},
            NotFound,
            "environment.name",
            "no environment 'moon'; there are: world",
            id="no such environment",
        ),
        pytest.param(
            {"dataset": {"split": "test"}},
            InvalidRequest,
            "dataset.split",
            "there is no 'test'",
            id="no such split",
        ),
        pytest.param(
            {"evaluation": {"dataset": {"split": "test"}}},
            InvalidRequest,
            "evaluation.dataset.split",
            "there is no 'test'",
            id="no such split to evaluate on",
        ),
    ],
)
async def test_what_the_environment_does_not_have_is_refused_when_the_job_is_created(
    mesh, changes, error, field, says
):
    with pytest.raises(error, match=says) as caught:
        await mesh.client.jobs.create(PROJECT, in_world(**changes), "j")
    assert caught.value.context["field"] == field


async def test_a_reward_by_an_environment_that_is_not_there_is_refused(mesh):
    spec = spec_of(
        prompt={"messages": [{"role": "user", "content": "{question}"}]},
        reward={"environment": "moon"},
    )
    with pytest.raises(NotFound, match=r"reward\.environment: there is no environment 'moon'"):
        await mesh.client.jobs.create(PROJECT, spec, "j")


async def test_a_job_in_an_environment_that_is_away_is_refused_for_now(mesh, fakes):
    fakes.reward.environments.away = "no replica answers"
    with pytest.raises(Unavailable, match="'world' is away: no replica answers"):
        await mesh.client.jobs.create(PROJECT, in_world(), "j")


async def test_a_running_job_names_its_environment_while_that_is_away_and_goes_on_after(
    mesh, fakes
):
    world = fakes.reward.environments
    world.latency_s = 0.01
    await mesh.client.jobs.create(PROJECT, in_world(stop={"max_steps": 50}), "j")
    await mesh.until_step("j", 1)
    world.away = "no replica answers"

    async def named() -> bool:
        told = (await mesh.client.jobs.get(J)).problems
        return "the environment 'world' is away: no replica answers" in told

    await eventually(named)
    members = (await mesh.client.fleet.get()).members
    (environment,) = (member for member in members if member.role == "environment")
    assert (environment.address, environment.serving) == ("world", False)
    assert environment.problem == "no replica answers"
    world.away = ""

    async def well() -> bool:
        return (await mesh.client.jobs.get(J)).problems == []

    await eventually(well)
    await mesh.client.jobs.cancel(J)
    await eventually(lambda: asyncio.sleep(0, world.open.total() == 0))


async def test_what_a_job_waits_for_is_told_while_it_waits(mesh, fakes):
    await mesh.client.jobs.create(PROJECT, in_world(stop={"max_steps": 1000}), "j")
    await mesh.until_step("j", 1)
    fakes.reward.away = True
    fakes.reward.environments.faults = [Unavailable("connection refused")] * 1000

    async def told() -> bool:
        problems = (await mesh.client.jobs.get(J)).problems
        return any("the reward does not answer" in problem for problem in problems)

    await eventually(told)
    watched = mesh.client.jobs.watch(J)
    async with contextlib.aclosing(watched) as events:
        warned = await anext(e.event async for e in events if isinstance(e.event, Warned))
    assert warned.reason == "REWARD_UNAVAILABLE"
    await mesh.client.jobs.cancel(J)

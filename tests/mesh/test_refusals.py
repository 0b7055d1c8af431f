"""What a user does wrong is said clearly, and every other job goes on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rollmesh import types
from rollmesh.errors import InvalidRequest, MeshError, NotFound
from rollmesh.job import StateChanged, StepCompleted

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROJECT = "projects/test"
BASE = types.PolicyRef(base_model="arith")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        pytest.param([], "prompt_token_ids", id="empty prompt"),
        pytest.param([1] * 600, "prompt_token_ids", id="over-long prompt"),
        pytest.param([1, 10**6], "prompt_token_ids", id="token outside the vocabulary"),
        pytest.param([1, -1], "prompt_token_ids", id="negative token"),
    ],
)
async def test_a_bad_prompt_is_refused_by_name(client, prompt, says):
    with pytest.raises(InvalidRequest, match=says) as caught:
        await client.sampling.sample(PROJECT, BASE, prompt)
    assert says in caught.value.context["field"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        pytest.param({"base_model": "gpt-9"}, NotFound, "arith", id="unknown base model"),
        pytest.param(
            {"reward": {"function": "exact_mach"}},
            InvalidRequest,
            "exact_match",
            id="unknown reward",
        ),
        pytest.param(
            {"reward": {"parameters": {"nope": 1}}}, InvalidRequest, "nope", id="reward parameter"
        ),
        pytest.param(
            {"dataset": {"generator": {"name": "arithmetik"}}},
            InvalidRequest,
            "arithmetic",
            id="unknown generator",
        ),
        pytest.param(
            {"prompt": {"messages": [{"role": "user", "content": "{questoin}"}]}},
            InvalidRequest,
            "question",
            id="unknown field in a template",
        ),
    ],
)
async def test_a_bad_job_is_refused_when_it_is_created(client, job_spec, changes, error, says):
    with pytest.raises(error, match=says):
        await client.jobs.create(PROJECT, job_spec(**changes))


async def test_a_bad_adapter_is_refused(client):
    for lora in (
        types.LoraConfig(rank=0),
        types.LoraConfig(rank=10**6),
        types.LoraConfig(rank=4, alpha=math.nan),
        types.LoraConfig(rank=4, target_modules=("no_such_proj",)),
    ):
        with pytest.raises(InvalidRequest):
            await client.adapters.create(f"{PROJECT}/adapters/bad", "arith", lora)
    with pytest.raises(InvalidRequest, match="arith"):
        await client.adapters.create(f"{PROJECT}/adapters/bad", "unknown", types.LoraConfig(rank=4))


async def test_a_nan_learning_rate_changes_nothing(client):
    name = f"{PROJECT}/adapters/nan-rate"
    await client.adapters.create(name, "arith", types.LoraConfig(rank=4))
    before = await client.adapters.publish(name)
    tokens = np.array([5, 6, 7], np.int32)
    datum = types.Datum(token_ids=tokens, target_token_ids=tokens)
    await client.training.forward_backward(name, 1, [datum], types.LossConfig("cross_entropy"))

    with pytest.raises(InvalidRequest, match="learning_rate"):
        await client.training.optim_step(name, 2, types.AdamConfig(learning_rate=math.nan))

    stepped = await client.training.optim_step(name, 2, types.AdamConfig(learning_rate=1e-3))
    assert stepped.policy_version == before.policy_version + 1


async def test_a_reward_that_fails_fails_its_job_alone(client, job_spec):
    healthy = await client.jobs.create(PROJECT, job_spec(stop={"max_steps": 4}, evaluation=None))
    failing = await client.jobs.create(
        PROJECT,
        job_spec(
            dataset={
                "tasks": [
                    {"fields": {"question": "1+1", "answer": "2"}},
                    {"fields": {"question": "1+2", "answer": "not a number"}},
                ]
            },
            reward={"function": "numeric_match"},
            evaluation=None,
        ),
    )

    events = [event.event async for event in client.jobs.watch(failing.name)]
    assert isinstance(events[-1], StateChanged)
    assert events[-1].to_state == "FAILED"
    assert "reference" in events[-1].reason

    others = [event.event async for event in client.jobs.watch(healthy.name)]
    assert isinstance(others[-1], StateChanged)
    assert others[-1].to_state == "SUCCEEDED"
    assert sum(isinstance(event, StepCompleted) for event in others) == 4


async def test_an_adapter_of_another_project_does_not_exist(client):
    name = "projects/owner/adapters/secret"
    await client.adapters.create(name, "arith", types.LoraConfig(rank=4))
    await client.adapters.publish(name)
    with pytest.raises(MeshError) as caught:
        await client.sampling.sample(PROJECT, types.PolicyRef(adapter=name), [5, 6])
    assert isinstance(caught.value, NotFound)

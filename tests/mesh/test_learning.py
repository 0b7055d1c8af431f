"""Jobs on a real mesh: rewards rise, adapters learn their own task, deaths cost time alone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollmesh import types
from rollmesh.cli.export import export_peft
from rollmesh.job import EvaluationCompleted, StateChanged, StepCompleted
from services.coordinator.datasets import generate

if TYPE_CHECKING:
    from rollmesh.job import JobEvent

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROJECT = "projects/test"


async def _events(client, name: str) -> list[JobEvent]:
    return [event async for event in client.jobs.watch(name)]


def _steps(events) -> list[StepCompleted]:
    return [event.event for event in events if isinstance(event.event, StepCompleted)]


def _final(events) -> StateChanged:
    assert isinstance(events[-1].event, StateChanged)
    return events[-1].event


def _greedy_accuracy(model, tokenizer, tasks) -> float:
    """Share of `tasks` that `model` answers rightly, greedily, computed by transformers alone."""
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": task.fields["question"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for task in tasks
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=8,
        )
    answers = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [answer == task.fields["answer"] for answer, task in zip(answers, tasks, strict=True)]
    return sum(right) / len(right)


async def test_a_job_learns_and_its_peft_adapter_reproduces_the_accuracy(
    client, job_spec, tmp_path
):
    spec = job_spec(stop={"max_steps": 50, "evaluation_reward": 0.95})

    job = await client.jobs.create(PROJECT, spec)
    events = await _events(client, job.name)

    assert _final(events).to_state == "SUCCEEDED", _final(events).reason
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    steps = _steps(events)
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.metrics["staleness_max"] == 0 for step in steps)
    evaluations = [e.event for e in events if isinstance(e.event, EvaluationCompleted)]
    assert 0.15 <= evaluations[0].reward_mean < 0.5
    assert evaluations[-1].reward_mean >= 0.9

    folder = tmp_path / "adapter"
    done = await client.jobs.get(job.name)
    await export_peft(client.adapters.export(done.adapter), done.adapter, folder)
    assert spec.evaluation is not None
    assert spec.evaluation.dataset.generator is not None
    generator = spec.evaluation.dataset.generator
    tasks = generate(generator.name, generator.parameters, seed=spec.seed)
    base = AutoModelForCausalLM.from_pretrained("models/arith", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained("models/arith")
    reproduced = _greedy_accuracy(model, tokenizer, tasks[: evaluations[-1].num_tasks])
    # Ties of the greedy choice may fall the other way in the engine's arithmetic.
    assert reproduced == pytest.approx(evaluations[-1].reward_mean, abs=0.03)


def _habit(count: int, split: str) -> list[dict]:
    """Tasks whose reference is the model's wrong habit: one too large."""
    tasks = generate("arithmetic", {"count": count, "split": split}, seed=3)
    return [
        {"fields": {**task.fields, "answer": str(int(task.fields["answer"]) + 1)}} for task in tasks
    ]


async def test_two_jobs_at_once_on_one_sampler_each_learn_their_own_task(client, job_spec):
    steps = {"max_steps": 22}
    right = job_spec(stop=steps)
    wrong = job_spec(
        stop=steps,
        dataset={"tasks": _habit(2000, "train")},
        evaluation={"dataset": {"tasks": _habit(200, "heldout")}, "every_steps": None},
    )

    jobs = [
        await client.jobs.create(PROJECT, right),
        await client.jobs.create("projects/other", wrong),
    ]
    histories = await asyncio.gather(*(_events(client, job.name) for job in jobs))

    for events in histories:
        assert _final(events).to_state == "SUCCEEDED", _final(events).reason
        rewards = [step.metrics["reward_mean"] for step in _steps(events)]
        assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.15, rewards
        evaluations = [e.event for e in events if isinstance(e.event, EvaluationCompleted)]
        # A right answer is never one too large: only the job's own adapter can score this on it.
        assert evaluations[-1].reward_mean > 0.75


async def test_a_killed_sampler_costs_a_job_time_alone(client, mesh, job_spec):
    job = await client.jobs.create(PROJECT, job_spec(stop={"max_steps": 6}, evaluation=None))
    killed = mesh.members["sampler-0"].pid
    events = []
    async for event in client.jobs.watch(job.name):
        events.append(event)
        if isinstance(event.event, StepCompleted) and event.event.step == 2:
            mesh.kill("sampler-0")

    assert _final(events).to_state == "SUCCEEDED", _final(events).reason
    assert [step.step for step in _steps(events)] == [1, 2, 3, 4, 5, 6]
    await mesh.serving()
    assert mesh.members["sampler-0"].pid not in {None, killed}


async def test_a_killed_coordinator_goes_on_where_it_was(client, mesh, job_spec):
    job = await client.jobs.create(PROJECT, job_spec(stop={"max_steps": 6}, evaluation=None))
    killed = mesh.members["coordinator"].pid
    before = []
    async for event in client.jobs.watch(job.name):
        before.append(event)
        if isinstance(event.event, StepCompleted) and event.event.step == 2:
            mesh.kill("coordinator")
            break
    await mesh.serving()
    assert mesh.members["coordinator"].pid not in {None, killed}

    after = [e async for e in client.jobs.watch(job.name, after_event=before[-1].number)]

    events = before + after
    assert _final(events).to_state == "SUCCEEDED", _final(events).reason
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [step.step for step in _steps(events)] == [1, 2, 3, 4, 5, 6]
    assert [step.policy_version for step in _steps(events)] == [1, 2, 3, 4, 5, 6]


async def test_a_stale_job_overlaps_but_never_beyond_its_bound(client, job_spec):
    spec = job_spec(stop={"max_steps": 8}, algorithm={"max_staleness": 2}, evaluation=None)
    job = await client.jobs.create(PROJECT, spec)
    events = await _events(client, job.name)
    assert _final(events).to_state == "SUCCEEDED", _final(events).reason
    staleness = [step.metrics["staleness_max"] for step in _steps(events)]
    assert max(staleness) == 2
    assert len(staleness) == 8


async def test_a_paused_job_rests_and_goes_on(client, job_spec):
    job = await client.jobs.create(PROJECT, job_spec(stop={"max_steps": 5}, evaluation=None))
    states = []
    steps = []
    async for event in client.jobs.watch(job.name):
        if isinstance(event.event, StepCompleted):
            steps.append(event.event.step)
            if event.event.step == 2:
                await client.jobs.pause(job.name)
        if isinstance(event.event, StateChanged):
            states.append(event.event.to_state)
            if event.event.to_state == "PAUSED":
                await client.jobs.resume(job.name)
    assert steps == [1, 2, 3, 4, 5]
    assert "PAUSED" in states
    assert states[-1] == "SUCCEEDED"


async def test_a_cancelled_job_ends_at_once_and_leaves_its_adapter(client, job_spec):
    job = await client.jobs.create(PROJECT, job_spec(stop={"max_steps": 1000}, evaluation=None))
    async for event in client.jobs.watch(job.name):
        if isinstance(event.event, StepCompleted):
            break

    cancelled = await client.jobs.cancel(job.name)

    assert cancelled.state == "CANCELLED"
    events = await _events(client, job.name)
    assert _final(events).to_state == "CANCELLED"
    adapter = await client.adapters.get(cancelled.adapter)
    assert adapter.published_version is not None
    policy = types.PolicyRef(adapter=adapter.name)
    (completion,) = await client.sampling.sample(
        PROJECT, policy, [3, 4, 5], params=types.SamplingParams(max_tokens=2, seed=1)
    )
    assert {span.digest for span in completion.spans} == {adapter.published_digest}

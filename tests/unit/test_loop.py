"""The job loop against a world with random latencies, in virtual time."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rollmesh.errors import (
    CapacityExhausted,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from rollmesh.types import PolicySpan
from services.coordinator.retry import RETRY_FOR_S
from tests.fakes.job_mesh import FIRST_TOKEN, HELD_OUT, TASKS, Context, JobMesh, held_out, spec
from tests.fakes.virtual_time import simulate

SEEDS = range(20)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_rollout_older_than_the_bound_is_trained_and_none_is_thrown_away(max_staleness, seed):
    mesh = JobMesh(Context(spec(algorithm={"max_staleness": max_staleness})), seed=seed)
    outcome = simulate(mesh.run())
    assert outcome.kind == "finished"
    assert mesh.version == 6
    assert [event.step for event in mesh.context.steps] == [1, 2, 3, 4, 5, 6]
    assert max(mesh.staleness) <= max_staleness
    assert set(mesh.trained_at) == set(mesh.sampled_from)
    assert mesh.under_way == []


def test_staleness_lets_sampling_overlap_training_and_none_forbids_it():
    for max_staleness, overlaps in [(0, False), (1, True)]:
        mesh = JobMesh(Context(spec(algorithm={"max_staleness": max_staleness})), seed=1)
        simulate(mesh.run())
        assert mesh.overlapped is overlaps
        assert max(mesh.staleness) == max_staleness


def test_old_versions_are_unloaded_and_the_last_stays():
    mesh = JobMesh(Context(spec(algorithm={"max_staleness": 2})), seed=3)
    simulate(mesh.run())
    assert 6 in mesh.live
    assert len(mesh.live) <= 3


def test_each_epoch_goes_through_all_tasks_in_another_order():
    mesh = JobMesh(Context(spec(stop={"max_steps": 7})), seed=2)
    simulate(mesh.run())
    prompts = groups_in_order(mesh)
    assert len(prompts) == 21
    epochs = [prompts[0:7], prompts[7:14], prompts[14:21]]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"{task.fields['question']}=" for task in TASKS)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(set(mesh.seeds)) == 21


def groups_in_order(mesh):
    """The prompt of each trained group, in the order of training."""
    first_tokens = [
        int(datum.target_token_ids[datum.target_token_ids >= FIRST_TOKEN][0])
        for data in mesh.data
        for datum in data[::2]
    ]
    return [mesh.prompt_of[token] for token in first_tokens]


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_whose_loop_dies_again_and_again_trains_every_step_and_task_once(max_staleness, seed):
    """The trainer and the store live on; each loop is killed after a random time."""
    whole = JobMesh(Context(spec(algorithm={"max_staleness": max_staleness})), seed=seed)
    simulate(whole.run())

    async def lives():
        for _ in range(1000):
            try:
                async with asyncio.timeout(mesh.rng.uniform(0, 25)):
                    return await mesh.run()
            except TimeoutError:
                assert mesh.under_way == [], "a cancelled loop left calls behind"
        raise AssertionError("the job makes no progress")

    context = Context(spec(algorithm={"max_staleness": max_staleness}, evaluation=held_out()))
    mesh = JobMesh(context, seed=seed)
    assert simulate(lives()).kind == "finished"
    assert mesh.version == 6
    assert [event.step for event in context.steps] == [1, 2, 3, 4, 5, 6]
    assert len(mesh.data) == len(mesh.adams) == 6
    assert max(mesh.staleness) <= max_staleness
    assert groups_in_order(mesh) == groups_in_order(whole)
    assert context.evaluated_at == [0, 6]


@pytest.mark.parametrize(
    ("done", "has_metrics"),
    [
        pytest.param("nothing", True, id="nothing of the step"),
        pytest.param("forward_backward", False, id="ForwardBackward but no OptimStep"),
        pytest.param("optim_step", False, id="OptimStep, but the step is not recorded"),
    ],
)
def test_a_loop_goes_on_in_the_middle_of_a_step(done, has_metrics):
    mesh = JobMesh(Context(spec(stop={"max_steps": 2})), seed=4)
    mesh.published[0] = "digest-0"
    if done != "nothing":
        mesh.answers[1] = None, None
        mesh.pending, mesh.next_sequence = True, 2
    if done == "optim_step":
        mesh.pending, mesh.next_sequence, mesh.version = False, 3, 1
    assert simulate(mesh.run()).kind == "finished"
    assert mesh.version == 2
    first, second = mesh.context.steps
    assert (first.step, first.policy_version, second.step) == (1, 1, 2)
    assert ("reward_mean" in first.metrics) is has_metrics
    assert ("grad_norm" in first.metrics) is (done != "optim_step")
    assert mesh.context.warnings == ([] if done == "nothing" else ["STEP_RECOVERED"])
    assert "reward_mean" in second.metrics


@pytest.mark.parametrize(
    ("version", "next_sequence"), [(0, 1), (2, 5), (5, 11), (3, 9), (4, 7), (3, 6)]
)
def test_an_adapter_that_is_elsewhere_fails_the_job_by_name(version, next_sequence):
    context = Context(spec())
    mesh = JobMesh(context)
    simulate_steps(context, 3)
    mesh.version, mesh.next_sequence = version, next_sequence
    with pytest.raises(FailedPrecondition, match=r"adapters/j is not where the job left it"):
        simulate(mesh.run())
    assert not mesh.published


def simulate_steps(context, count):
    simulate(JobMesh(Context(context.spec, context.events)).run())
    del context.events[count:]


@pytest.mark.parametrize("call", ["get_adapter", "forward_backward", "optim_step", "publish"])
def test_an_adapter_that_nobody_knows_fails_the_job_by_name(call):
    mesh = JobMesh(Context(spec()))
    mesh.faults[call] = [NotFound("not held here")]
    with pytest.raises(FailedPrecondition, match=r"not where the job left it: .*not held here"):
        simulate(mesh.run())


@pytest.mark.parametrize("pause_after", [0, 2, 6])
@pytest.mark.parametrize("seed", range(5))
def test_pause_ends_the_loop_between_two_steps_and_a_new_one_goes_on(pause_after, seed):
    algorithm = {"max_staleness": 3, "groups_per_step": 2}
    context = Context(spec(algorithm=algorithm), pause_after=pause_after)
    mesh = JobMesh(context, seed=seed)
    mesh.slowness = {"sample": 10.0}

    async def paused():
        assert (await mesh.run()).kind == "paused"
        if pause_after:
            # Whatever is under way for the next steps is cancelled, not waited for.
            assert asyncio.get_running_loop().time() == mesh.last_event_at

    simulate(paused())
    assert mesh.version == context.step == len(mesh.data) == pause_after
    assert mesh.under_way == []
    context.pause_after = None
    assert simulate(mesh.run()).kind == "finished"
    assert [event.step for event in context.steps] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("seed", SEEDS)
def test_cancelling_leaves_no_call_behind(seed):
    mesh = JobMesh(Context(spec(algorithm={"max_staleness": 1}, evaluation=held_out())), seed=seed)

    async def cancelled():
        try:
            async with asyncio.timeout(seed):
                await mesh.run()
        except TimeoutError:
            assert mesh.under_way == []

    simulate(cancelled())


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        pytest.param(None, [], id="none"),
        pytest.param(held_out(), [0, 6], id="before and after"),
        pytest.param(held_out(every_steps=2), [0, 2, 4, 6], id="every second step"),
        pytest.param(held_out(every_steps=4), [0, 4, 6], id="every fourth step"),
        pytest.param(held_out(every_steps=100), [0, 6], id="more than there are"),
    ],
)
def test_evaluation_is_greedy_on_the_version_of_its_step(evaluation, expected):
    context = Context(spec(evaluation=evaluation))
    mesh = JobMesh(context, seed=6)
    simulate(mesh.run())
    assert context.evaluated_at == expected
    assert sorted(mesh.evaluation_prompts) == [
        (step, f"{task.fields['question']}=") for step in expected for task in HELD_OUT
    ]


def test_a_job_succeeds_early_when_an_evaluation_is_good_enough():
    context = Context(
        spec(
            stop={"max_steps": 6, "evaluation_reward": 0.9},
            evaluation=held_out(every_steps=2),
            algorithm={"max_staleness": 1},
        )
    )
    mesh = JobMesh(context, seed=7)
    mesh.evaluation_rewards = {2: 0.8, 4: 0.9, 6: 1.0}
    outcome = simulate(mesh.run())
    assert outcome.kind == "finished"
    assert "0.9" in outcome.reason
    assert (mesh.version, context.evaluated_at) == (4, [0, 2, 4])
    assert mesh.under_way == []


def test_a_reward_that_refuses_fails_the_job_with_its_message():
    mesh = JobMesh(Context(spec()))
    mesh.faults["score"] = [
        InvalidRequest("no function 'exact'; there are: a, b", field="function")
    ]
    with pytest.raises(InvalidRequest, match="there are: a, b") as caught:
        simulate(mesh.run())
    assert caught.value.context["field"] == "function"
    assert mesh.under_way == []


@pytest.mark.parametrize("call", ["score", "forward_backward", "optim_step", "publish"])
@pytest.mark.parametrize("seed", range(6))
def test_a_peer_that_is_away_for_a_moment_costs_one_warning(call, seed):
    context = Context(spec(evaluation=held_out()))
    mesh = JobMesh(context, seed=seed)
    mesh.faults[call] = [Unavailable("gone"), Overloaded("full"), Unavailable("gone")]
    assert simulate(mesh.run()).kind == "finished"
    assert (mesh.version, len(mesh.data), context.step) == (6, 6, 6)
    peer = "REWARD" if call == "score" else "TRAINER"
    assert set(context.warnings) == {f"{peer}_UNAVAILABLE"}
    # Several groups may find the reward service away before one of them finds it back.
    assert len(context.warnings) <= (3 if call == "score" else 1)


@pytest.mark.parametrize("seed", range(3))
def test_groups_that_wait_for_a_lost_sampler_say_so_once_for_each_outage(seed):
    context = Context(spec(evaluation=held_out()))
    mesh = JobMesh(context, seed=seed)
    mesh.sampler_losses = 1.0
    assert simulate(mesh.run()).kind == "finished"
    assert set(context.warnings) == {"SAMPLER_UNAVAILABLE"}
    # Each step samples its three groups at once, and each evaluation its five tasks.
    assert len(context.warnings) < 6 * 3 + 2 * 5


def test_a_batch_too_large_for_one_message_fails_the_job_and_says_what_to_lower():
    mesh = JobMesh(Context(spec()))
    mesh.faults["forward_backward"] = [CapacityExhausted("larger than max (9 vs. 8)")]
    says = r"^step 1: its \d+ rollouts .*\(larger than max \(9 vs. 8\)\); algorithm.groups_per_step"
    with pytest.raises(CapacityExhausted, match=says):
        simulate(mesh.run())


@pytest.mark.parametrize("call", ["score", "forward_backward"])
def test_a_peer_that_stays_away_fails_the_job_after_a_bounded_time(call):
    mesh = JobMesh(Context(spec()))
    mesh.faults[call] = [Unavailable("gone")] * 10_000

    async def timed():
        with pytest.raises(Unavailable, match="has been away for 120 s: gone"):
            await mesh.run()
        return asyncio.get_running_loop().time()

    assert RETRY_FOR_S <= simulate(timed()) < RETRY_FOR_S + 60
    assert len(mesh.context.warnings) == 1


@pytest.mark.parametrize(
    ("spans", "named"),
    [
        pytest.param([PolicySpan(3, -1, "")], "version -1", id="the base model"),
        pytest.param([PolicySpan(3, 0, "digest-1")], "version 0", id="an old version"),
        pytest.param([PolicySpan(3, 1, "x")], "digest 'x'", id="other weights"),
        pytest.param(
            [PolicySpan(2, 1, "digest-1"), PolicySpan(1, 0, "digest-0")],
            "1 tokens of completion 0 came from version 0",
            id="the last token alone",
        ),
        pytest.param([PolicySpan(2, 1, "digest-1")], "spans over 2 tokens", id="a gap"),
        pytest.param([], "spans over 0 tokens", id="no provenance"),
    ],
)
def test_tokens_of_another_policy_fail_the_job_instead_of_training_it(spans, named):
    mesh = JobMesh(Context(spec()), seed=8)
    mesh.length = lambda: 3
    mesh.spans = lambda source, _: tuple(spans) if source.policy_version == 1 else None
    with pytest.raises(InternalError, match=named):
        simulate(mesh.run())
    assert mesh.version == 1


def test_groups_with_equal_rewards_are_counted_and_the_step_is_taken():
    mesh = JobMesh(Context(spec()), seed=9)
    mesh.same_rewards = True
    simulate(mesh.run())
    assert mesh.version == 6
    assert {step.metrics["groups_with_equal_rewards"] for step in mesh.context.steps} == {3.0}
    assert all(not datum.advantages.any() for data in mesh.data for datum in data)


def test_groups_with_equal_rewards_are_replaced_so_often_and_then_trained_as_they_are():
    mesh = JobMesh(Context(spec(algorithm={"max_group_replacements": 2})), seed=9)
    mesh.tasks = TASKS[:1]
    mesh.same_rewards = True
    simulate(mesh.run())
    assert {step.metrics["groups_replaced"] for step in mesh.context.steps} == {3 * 2.0}
    assert {step.metrics["groups_with_equal_rewards"] for step in mesh.context.steps} == {3.0}
    # Also of the only task there is: to draw the same again would help nobody.
    assert len(mesh.seeds) == len(set(mesh.seeds)) == 6 * 3 * 3


def test_a_step_tells_all_metrics_and_phases():
    context = Context(spec(algorithm={"kl_coefficient": 0.1, "learning_rate": {"peak": 0.5}}))
    mesh = JobMesh(context, seed=10)
    simulate(mesh.run())
    step = context.steps[-1]
    assert set(step.metrics) == {
        "reward_mean",
        "reward_std",
        "loss",
        "grad_norm",
        "learning_rate",
        "kl_sampler",
        "kl_base",
        "ratio_max",
        "queued_s",
        "run_s",
        "logprob_gap_max",
        "logprob_gap_mean",
        "staleness_mean",
        "staleness_max",
        "completion_tokens_mean",
        "num_tokens",
        "num_rollouts",
        "tokens_per_s",
        "groups_with_equal_rewards",
        "truncated_fraction",
    }
    assert set(step.phases) == {
        "sample",
        "reward",
        "wait",
        "forward_backward",
        "optim_step",
        "publish",
        "load",
        "step",
    }
    in_turn = ("wait", "forward_backward", "optim_step", "publish", "load")
    assert step.phases["step"] == pytest.approx(sum(step.phases[name] for name in in_turn))
    assert step.metrics["learning_rate"] == 0.5
    assert (step.metrics["queued_s"], step.metrics["run_s"]) == (0.25 + 0.5, 1 + 2)
    assert step.metrics["num_rollouts"] == 6
    assert step.metrics["reward_mean"] == 0.5
    tokens = [token for token, version in mesh.sampled_from.items() if version == 5]
    assert step.metrics["num_tokens"] == len(tokens)
    assert step.metrics["tokens_per_s"] == pytest.approx(len(tokens) / step.phases["step"])
    assert mesh.loss_configs[0].kl_coefficient == 0.1


def test_without_a_kl_penalty_none_is_measured_either():
    mesh = JobMesh(Context(spec()), seed=10)
    simulate(mesh.run())
    assert {config.kl_coefficient for config in mesh.loss_configs} == {None}
    assert "kl_base" not in mesh.context.steps[0].metrics


def test_the_optimizer_gets_the_schedule_and_the_algorithms_settings():
    algorithm = {
        "learning_rate": {"peak": 1.0, "schedule": "linear", "warmup_steps": 1},
        "max_grad_norm": 0.25,
        "weight_decay": 0.1,
        "beta1": 0.8,
    }
    mesh = JobMesh(Context(spec(algorithm=algorithm)), seed=1)
    simulate(mesh.run())
    assert [adam.learning_rate for adam in mesh.adams] == pytest.approx(
        [0.5, 1, 0.75, 0.5, 0.25, 0]
    )
    assert {(a.max_grad_norm, a.weight_decay, a.beta1) for a in mesh.adams} == {(0.25, 0.1, 0.8)}


def test_a_prompt_that_the_sampler_refuses_is_named_with_its_length():
    mesh = JobMesh(Context(spec()), seed=1)
    mesh.faults["sample"] = [InvalidRequest("no room in the context", field="prompt_token_ids")]
    with pytest.raises(InvalidRequest, match=r"task 't\d', whose prompt has 3 tokens: no room"):
        simulate(mesh.run())


def test_a_template_that_fits_no_task_fails_the_job_before_it_costs_anything():
    mesh = JobMesh(Context(spec(prompt={"text": "{querstion}"})))
    with pytest.raises(InvalidRequest, match="no field 'querstion'; it has: answer, question"):
        simulate(mesh.run())
    assert mesh.under_way == []
    assert not mesh.published


def test_the_data_of_a_step_is_shifted_masked_and_averaged():
    mesh = JobMesh(Context(spec(stop={"max_steps": 1})), seed=2)
    simulate(mesh.run())
    (data,) = mesh.data
    for datum in data:
        completion = datum.target_token_ids[datum.target_token_ids >= FIRST_TOKEN]
        num_prompt = len("q0=")
        assert len(datum.token_ids) == num_prompt + len(completion) - 1
        assert (datum.token_ids[1:] == datum.target_token_ids[:-1]).all()
        assert not datum.weights[: num_prompt - 1].any()
        assert datum.weights[num_prompt - 1 :].sum() == pytest.approx(1 / len(data))
        assert (datum.sampling_logprobs[num_prompt - 1 :] == np.float32(-0.5)).all()
        assert np.unique(datum.advantages[num_prompt - 1 :]).size == 1

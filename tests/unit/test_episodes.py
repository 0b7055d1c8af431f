"""Jobs whose rollouts take place in an environment, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest

from rollmesh.chat import Message, ToolCall
from rollmesh.errors import (
    EnvironmentFailed,
    EnvironmentTimeout,
    EnvironmentUnavailable,
    Overloaded,
    Unavailable,
)
from rollmesh.job import EnvironmentSpec, Warned
from services.coordinator.datasets import Task
from services.coordinator.group_bytes import group_from_bytes
from services.coordinator.retry import RETRY_FOR_S
from services.coordinator.rollouts import TaskOrder
from services.coordinator.tolerance import (
    MAX_LOST,
    MAX_LOST_BESIDE_OTHERS,
    GaveUp,
    Tolerance,
)
from tests.fakes.job_mesh import FIRST_TOKEN, Context, JobMesh, spec
from tests.fakes.virtual_time import simulate
from tests.fakes.worlds import FakeEnvironments, with_limits

SEEDS = range(8)
WORLD = {"dataset": {"split": "train"}, "prompt": None, "reward": None}


def in_world(*, seed=0, has_episodes=True, environment=None, **values):
    """A mesh with a job in the fake environment."""
    job = spec(environment={"name": "world", **(environment or {})}, **WORLD, **values)
    mesh = JobMesh(Context(job), seed=seed)
    mesh.world = FakeEnvironments(has_episodes=has_episodes)
    mesh.world.latency_s = 1.0
    if not has_episodes:
        mesh.tasks = [
            Task(f"t{n}", {"n": str(n)}, "train", (Message("user", f"t{n}?"),)) for n in range(7)
        ]
    return mesh


def read(datum) -> str:
    """A rollout as text: what the environment said, and `*` for each token that was drawn."""
    tokens = [int(datum.token_ids[0]), *datum.target_token_ids.tolist()]
    return "".join("*" if token >= FIRST_TOKEN else chr(token) for token in tokens)


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_episodes_are_trained_on_as_they_were_played_and_never_too_old(seed, max_staleness):
    mesh = in_world(seed=seed, algorithm={"max_staleness": max_staleness})
    assert simulate(mesh.run()).kind == "finished"
    assert max(mesh.staleness) <= max_staleness
    assert set(mesh.trained_at) == set(mesh.sampled_from)
    for datum in (datum for data in mesh.data for datum in data):
        text = read(datum)
        *turns, last = text.split("t")[1:]
        number = int(text[1])
        # Each observation once, in its order, and after each at least one token that was drawn.
        told = [f"{number}/", *(f"{number}:{turn}" for turn in range(1, max(number, 1)))]
        for turn, said in zip([*turns, last], told, strict=True):
            assert turn.startswith(said)
            assert turn.endswith("*")
        drawn = datum.target_token_ids >= FIRST_TOKEN
        assert (datum.weights > 0).tolist() == drawn.tolist()
        assert (datum.sampling_logprobs < 0).tolist() == drawn.tolist()


def test_the_rollouts_of_a_group_play_the_same_task_with_the_same_seed_and_others_with_another():
    mesh = in_world(algorithm={"group_size": 4}, stop={"max_steps": 3})
    simulate(mesh.run())
    by_episode = Counter((task, seed) for task, seed, _ in mesh.world.played)
    assert set(by_episode.values()) == {4}
    assert len({seed for _, seed in by_episode}) == len(by_episode) == 9
    assert len(set(mesh.seeds)) == len(mesh.seeds), "each turn of each rollout draws of its own"


def test_a_step_tells_turns_parts_of_rewards_and_what_was_cut_off():
    mesh = in_world(environment={"max_turns": 3}, stop={"max_steps": 3}, seed=5)
    simulate(mesh.run())
    for step in mesh.context.steps:
        assert 1 <= step.metrics["turns_mean"] <= 3
        assert step.metrics["reward.end"] == 1.0
        assert step.metrics["rollouts_given_up"] == 0
    played = Counter(task for task, *_ in mesh.world.played)
    cut_off = {task: count for task, count in played.items() if int(task[1:]) > 3}
    assert Counter(mesh.world.given_up) == cut_off
    shares = [step.metrics["truncated_fraction"] for step in mesh.context.steps]
    assert sum(shares) * 6 == pytest.approx(sum(cut_off.values()))


@pytest.mark.parametrize(
    ("limits", "environment", "longest"),
    [
        pytest.param({}, {}, 6, id="to their ends"),
        pytest.param({"max_turns": 4}, {}, 4, id="the environment's limit"),
        pytest.param({"max_turns": 4}, {"max_turns": 2}, 2, id="the job's is lower"),
        pytest.param({"max_turns": 2}, {"max_turns": 4}, 2, id="the environment's is lower"),
    ],
)
def test_no_rollout_has_more_turns_than_both_limits_allow(limits, environment, longest):
    mesh = in_world(environment=environment)
    mesh.world.info = with_limits(mesh.world.info, **limits)
    simulate(mesh.run())
    assert max(len(said) for *_, said in mesh.world.played) == longest


def test_a_rollout_ends_where_the_context_has_no_room_for_another_turn():
    mesh = in_world(seed=3)
    mesh.max_length = 16
    simulate(mesh.run())
    lengths = [len(datum.token_ids) + 1 for data in mesh.data for datum in data]
    assert max(lengths) <= 16 + 3, "a completion is at most four tokens, of which one had room"
    assert mesh.world.given_up


def test_no_more_episodes_are_open_at_once_than_the_environment_takes():
    mesh = in_world(algorithm={"groups_per_step": 8, "group_size": 4})
    mesh.world.info = with_limits(mesh.world.info, max_concurrent_episodes=5)
    simulate(mesh.run())
    assert mesh.world.most_open == 5
    assert mesh.world.open.total() == 0


@pytest.mark.parametrize(
    "fault", [EnvironmentFailed("it broke"), EnvironmentTimeout("it was slow")], ids=repr
)
def test_an_episode_at_which_the_environment_failed_is_played_again(fault):
    mesh = in_world(stop={"max_steps": 2})
    mesh.world.faults = [*[None] * 7, fault, None, None, fault]
    assert simulate(mesh.run()).kind == "finished"
    assert mesh.context.warnings == []
    assert [step.metrics["num_rollouts"] for step in mesh.context.steps] == [6, 6]
    assert set(mesh.trained_at) < set(mesh.sampled_from), "what was drawn before is thrown away"


def always(fault, calls=10_000):
    return [fault] * calls


def test_a_rollout_that_is_given_up_is_told_and_counted_and_its_group_is_of_another_task():
    mesh = in_world(
        environment={"max_retries": 1}, algorithm={"groups_per_step": 1}, stop={"max_steps": 1}
    )
    mesh.world.faults = [EnvironmentFailed("it broke"), EnvironmentFailed("it broke again")]
    mesh.world.latency_s = 0.0
    assert simulate(mesh.run()).kind == "finished"
    (warned,) = [event for event in mesh.context.events if isinstance(event, Warned)]
    assert warned.reason == "ENVIRONMENT_FAILED"
    assert "tried 2 times and is given up: it broke again" in warned.message
    (step,) = mesh.context.steps
    assert step.metrics["rollouts_given_up"] == 1
    assert mesh.context.memory["tolerance"] == {"num_given_up": 1}
    assert len({read(datum)[:2] for data in mesh.data for datum in data}) == 1
    first = TaskOrder(mesh.tasks, mesh.context.spec.seed).choose(0, 0).id
    assert first in warned.message
    assert first not in [prompt[:2] for prompt in mesh.prompt_of.values()]


def test_one_failure_more_than_the_job_puts_up_with_fails_it_and_says_what_failed():
    mesh = in_world(environment={"max_retries": 0, "max_failures": 2})
    mesh.world.faults = always(EnvironmentFailed("it broke"))
    with pytest.raises(
        EnvironmentFailed, match=r"max_failures is 2, and this is one more: .*broke"
    ):
        simulate(mesh.run())
    assert mesh.world.open.total() == 0


@pytest.mark.parametrize("has_episodes", [True, False], ids=["episodes", "single turns"])
def test_a_task_that_is_broken_costs_one_rollout_however_large_its_group(has_episodes):
    mesh = in_world(
        has_episodes=has_episodes,
        environment={"max_failures": 1},
        algorithm={"groups_per_step": 1, "group_size": 32},
        stop={"max_steps": 7},
    )
    mesh.world.broken = {"t2"}
    assert simulate(mesh.run()).kind == "finished"
    assert mesh.context.steps[-1].metrics["rollouts_given_up"] == 1
    assert mesh.context.warnings == ["ENVIRONMENT_FAILED"]
    assert mesh.world.open.total() == 0
    assert all(step.metrics["num_rollouts"] == 32 for step in mesh.context.steps)


def test_the_others_of_a_group_that_is_lost_are_not_played_on():
    mesh = in_world(
        environment={"max_retries": 0},
        algorithm={"groups_per_step": 1, "group_size": 32},
        stop={"max_steps": 1},
    )
    first = TaskOrder(mesh.tasks, mesh.context.spec.seed).choose(0, 0).id
    faults = always(None, 32 + 3)  # As many as begin, and a few actions more.
    mesh.world.faults = [*faults, EnvironmentFailed("it broke")]
    assert simulate(mesh.run()).kind == "finished"
    ended = [said for task, _, said in mesh.world.played if task == first]
    assert len(ended) == 32
    assert sum(map(len, ended)) <= 3


def test_an_environment_that_one_task_kills_is_not_killed_for_ever_and_only_that_one_is_given_up():
    mesh = in_world(algorithm={"group_size": 4, "max_staleness": 1}, stop={"max_steps": 4})
    mesh.world.deadly = {"t2"}
    assert simulate(mesh.run()).kind == "finished"
    told = [event.message for event in mesh.context.events if isinstance(event, Warned)]
    given_up = [message for message in told if "is given up" in message]
    assert given_up
    for message in given_up:
        lost = f"an episode of task 't2' of world was lost {MAX_LOST} times after it had begun"
        assert message == f"{lost} and is given up: world died"
    assert mesh.context.memory["tolerance"] == {"num_given_up": len(given_up)}
    of_group = MAX_LOST_BESIDE_OTHERS + 4 * (MAX_LOST - MAX_LOST_BESIDE_OTHERS)
    assert mesh.world.deaths <= len(given_up) * of_group
    assert mesh.world.open.total() == 0
    assert mesh.context.problems == {}


@pytest.mark.parametrize("seed", SEEDS)
def test_an_environment_that_is_killed_now_and_then_costs_no_rollout(seed):
    mesh = in_world(seed=seed, environment={"max_retries": 0, "max_failures": 0})

    async def kill():
        while True:
            await asyncio.sleep(mesh.rng.uniform(20, 60))
            mesh.world.die()

    async def scenario():
        async with asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(kill())
            outcome = await mesh.run()
            killing.cancel()
        return outcome

    assert simulate(scenario()).kind == "finished"
    assert mesh.world.deaths >= 2
    assert mesh.context.memory["tolerance"] == {"num_given_up": 0}
    assert set(mesh.context.warnings) <= {"ENVIRONMENT_UNAVAILABLE"}


def test_a_group_that_is_cancelled_while_one_of_it_is_given_up_is_cancelled():
    async def scenario():
        tolerance = Tolerance(
            EnvironmentSpec(name="world"), patience=None, warn=Context.pause_requested, memory={}
        )

        async def give_up():
            group.cancel()
            raise GaveUp("it broke")

        group = asyncio.create_task(tolerance.group([give_up] * 2))
        with pytest.raises(asyncio.CancelledError):
            await group
        assert tolerance.num_given_up == 0

    simulate(scenario())


def test_what_was_given_up_before_an_interruption_counts():
    mesh = in_world(environment={"max_retries": 0, "max_failures": 2})
    mesh.context.memory = {"tolerance": {"num_given_up": 2}}
    mesh.world.faults = [EnvironmentFailed("it broke")]
    with pytest.raises(EnvironmentFailed, match="one more"):
        simulate(mesh.run())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (EnvironmentUnavailable("world is away"), "ENVIRONMENT_UNAVAILABLE"),
        (Unavailable("connection refused"), "REWARD_UNAVAILABLE"),
        (Overloaded("its queue is full"), "REWARD_UNAVAILABLE"),
    ],
    ids=repr,
)
def test_while_the_environment_is_away_the_job_waits_and_says_so_and_nothing_is_counted(
    fault, reason
):
    mesh = in_world(environment={"max_retries": 0, "max_failures": 0}, stop={"max_steps": 2})
    mesh.world.faults = always(fault, 60)
    seen = []

    async def look():
        while True:
            seen.append(dict(mesh.context.problems))
            await asyncio.sleep(0.05)

    async def scenario():
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(look())
            outcome = await mesh.run()
            looking.cancel()
        return outcome

    assert simulate(scenario()).kind == "finished"
    assert set(mesh.context.warnings) == {reason}
    peer = reason.removesuffix("_UNAVAILABLE").lower()
    assert any(str(fault) in problems.get(peer, "") for problems in seen)
    assert mesh.context.problems == {}


def test_an_environment_that_stays_away_fails_the_job():
    mesh = in_world()
    mesh.world.faults = always(EnvironmentUnavailable("world is away"))
    message = f"the environment has been away for {RETRY_FOR_S:g} s: world is away"
    with pytest.raises(Unavailable, match=message):
        simulate(mesh.run())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cancelled_job_leaves_no_episode_open(seed):
    mesh = in_world(seed=seed, algorithm={"max_staleness": 1})

    async def scenario():
        running = asyncio.create_task(mesh.run())
        await asyncio.sleep(mesh.rng.uniform(1, 40))
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert mesh.world.open.total() == 0

    simulate(scenario())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_whose_loop_dies_again_and_again_trains_every_step_once(seed):
    mesh = in_world(seed=seed)

    async def scenario():
        while len(mesh.context.steps) < 6:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(mesh.rng.uniform(5, 60)):
                    await mesh.run()

    simulate(scenario())
    assert [step.step for step in mesh.context.steps] == [1, 2, 3, 4, 5, 6]
    assert max(mesh.staleness) == 0


def test_evaluation_plays_each_held_out_task_once_greedily():
    evaluation = {"dataset": {"split": "heldout"}}
    mesh = in_world(evaluation=evaluation, stop={"max_steps": 1})
    simulate(mesh.run())
    assert [event.num_tasks for event in mesh.context.evaluations] == [5, 5]
    assert {event.reward_mean for event in mesh.context.evaluations} == {1.0}
    held_out = [task for task, *_ in mesh.world.played if task.startswith("h")]
    assert Counter(held_out) == dict.fromkeys(["h0", "h1", "h2", "h3", "h4"], 2)


def test_tasks_that_the_environment_fails_at_are_left_out_of_an_evaluation():
    mesh = in_world(evaluation={"dataset": {"split": "heldout"}}, environment={"max_retries": 0})
    mesh.world.faults = [EnvironmentFailed("it broke")]
    mesh.context.spec = mesh.context.spec.model_copy(
        update={"stop": mesh.context.spec.stop.model_copy(update={"max_steps": 1})}
    )
    simulate(mesh.run())
    assert mesh.context.evaluations[0].num_tasks == 4


def test_a_successor_says_that_the_environment_has_other_tasks_and_goes_on():
    mesh = in_world(stop={"max_steps": 2})
    mesh.context.pause_after = 1
    assert simulate(mesh.run()).kind == "paused"
    mesh.context.pause_after = None
    mesh.tasks = mesh.tasks[:5]
    assert simulate(mesh.run()).kind == "finished"
    assert mesh.context.warnings == ["ENVIRONMENT_CHANGED"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_curriculum_goes_on_with_the_tasks_that_there_are(seed):
    mesh = in_world(
        seed=seed, curriculum={"max_reward": 0.99}, algorithm={"max_staleness": 1, "group_size": 2}
    )

    async def scenario():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(mesh.rng.uniform(35, 70)):
                await mesh.run()
        kept = {group_from_bytes(body).task.id for body in mesh.context.kept.values()}
        mesh.tasks = [task for task in mesh.tasks if task.id not in kept][:2]
        return await mesh.run()

    assert simulate(scenario()).kind == "finished"
    told = [event for event in mesh.context.events if isinstance(event, Warned)]
    (changed,) = [event for event in told if event.reason == "ENVIRONMENT_CHANGED"]
    assert changed.message.endswith("the curriculum begins anew")


@pytest.mark.parametrize("turn", [0, 1])
def test_a_tool_call_that_is_no_json_is_the_environments_failure(turn):
    mesh = in_world(environment={"max_failures": 0, "max_retries": 0})
    call = Message("assistant", "", (ToolCall("call_0", "add", "{oops"),))
    mesh.world.shows = {turn: call}
    with pytest.raises(EnvironmentFailed, match=r"a call of 'add' are no JSON: '{oops'"):
        simulate(mesh.run())
    assert mesh.world.open.total() == 0


class TestSingleTurns:
    def test_an_environment_without_episodes_scores_single_turns(self):
        mesh = in_world(has_episodes=False, stop={"max_steps": 2})
        simulate(mesh.run())
        asked = {item.task.id: item.messages[0].content for item in mesh.world.scored}
        assert asked == {task: f"{task}?" for task in asked}
        assert {item.messages[-1].role for item in mesh.world.scored} == {"assistant"}
        for step in mesh.context.steps:
            assert step.metrics["reward.half"] == pytest.approx(step.metrics["reward_mean"] / 2)

    def test_an_answer_at_which_it_failed_is_asked_about_again_alone(self):
        mesh = in_world(has_episodes=False, stop={"max_steps": 1})
        mesh.world.failures = {mesh.tasks[0].id: 1, mesh.tasks[1].id: 2, mesh.tasks[2].id: 2}
        simulate(mesh.run())
        assert mesh.context.warnings == []
        asked = Counter(item.task.id for item in mesh.world.scored)
        again = {task: 2 - left for task, left in zip(mesh.world.failures, [1, 2, 2], strict=True)}
        assert again
        assert asked
        (step,) = mesh.context.steps
        assert step.metrics["rollouts_given_up"] == 0

    def test_a_whole_call_that_fails_is_tried_again_answer_by_answer(self):
        mesh = in_world(has_episodes=False, stop={"max_steps": 1}, algorithm={"group_size": 4})
        mesh.world.faults = [EnvironmentTimeout("it was slow")]
        simulate(mesh.run())
        (step,) = mesh.context.steps
        assert step.metrics["num_rollouts"] == 12
        assert len(mesh.world.scored) == 12

    def test_an_answer_that_is_given_up_has_its_group_replaced(self):
        mesh = in_world(
            has_episodes=False,
            environment={"max_retries": 0},
            algorithm={"groups_per_step": 1},
            stop={"max_steps": 1},
        )
        mesh.world.faults = [EnvironmentFailed("it broke")]
        simulate(mesh.run())
        assert mesh.context.warnings == ["ENVIRONMENT_FAILED"]
        assert mesh.context.steps[0].metrics["rollouts_given_up"] == 1
        assert len({item.task.id for item in mesh.world.scored}) == 1

    def test_an_environment_scores_a_jobs_own_tasks(self):
        job = spec(
            prompt={"messages": [{"role": "user", "content": "{question}="}]},
            reward={"environment": "world"},
            stop={"max_steps": 1},
        )
        mesh = JobMesh(Context(job))
        mesh.world = FakeEnvironments(has_episodes=False)
        simulate(mesh.run())
        assert len(mesh.world.scored) == 6
        item = mesh.world.scored[0]
        assert item.task.fields.keys() == {"question", "answer"}
        assert [message.content for message in item.messages[:-1]] == [
            f"{item.task.fields['question']}="
        ]
        assert mesh.context.steps[0].metrics["reward.digit"] > 0


def test_what_is_kept_of_a_group_is_the_group_as_it_was_played():
    mesh = in_world(stop={"max_steps": 1}, algorithm={"groups_per_step": 2})
    kept = {}
    keep = mesh.keep

    async def note(number, group):
        kept[number] = group_from_bytes(group)
        await keep(number, group)

    mesh.keep = note
    simulate(mesh.run())
    (data,) = mesh.data
    rollouts = [rollout for number in sorted(kept) for rollout in kept[number].rollouts]
    assert [rollout.token_ids for rollout in rollouts] == [
        [int(datum.token_ids[0]), *datum.target_token_ids.tolist()] for datum in data
    ]

"""A job whose loop dies, wherever it is, and is gone on with by another; in virtual time.

The trainer, the samplers and the store live on. That nothing is trained twice and that no finished
group is sampled again is what the fake itself asserts, whatever the loop does.
"""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.job import Warned
from services.coordinator import loop
from services.coordinator.group_bytes import group_from_bytes
from services.coordinator.rollouts import TaskOrder, derived_seed
from tests.fakes.job_mesh import TASKS, Context, JobMesh, held_out, spec
from tests.fakes.virtual_time import VirtualTimeLoop, simulate
from tests.unit.test_loop import groups_in_order

STEPS = 3
_OF_TIMES = {"tokens_per_s", "logprob_gap_max", "logprob_gap_mean"}


class MortalLoop(VirtualTimeLoop):
    """Kills the job at its turn number `dies_at`: each of its awaits lies between two turns."""

    def __init__(self, dies_at: int) -> None:
        super().__init__()
        self._dies_at = dies_at
        self.turns = 0
        self.job: asyncio.Task | None = None

    def _run_once(self):
        if self.job is not None:
            self.turns += 1
            if self.turns == self._dies_at:
                self.job.cancel()
        super()._run_once()


def lived(mesh, dies_at=0):
    """How many turns the job took, and whether it came to its end."""

    async def job():
        asyncio.get_running_loop().job = asyncio.current_task()
        return await mesh.run()

    with asyncio.Runner(loop_factory=lambda: MortalLoop(dies_at)) as runner:
        loop = runner.get_loop()
        try:
            outcome = runner.run(job())
        except asyncio.CancelledError:
            assert mesh.under_way == [], "a loop that was killed left calls behind"
            return loop.turns, False
    assert outcome.kind == "finished"
    return loop.turns, True


def job_mesh(max_staleness, replacements, *, seed=3, **values):
    algorithm = {
        "max_staleness": max_staleness,
        "max_group_replacements": replacements,
        "groups_per_step": 2,
    }
    mesh = JobMesh(
        Context(spec(algorithm=algorithm, stop={"max_steps": STEPS}, **values)), seed=seed
    )
    mesh.equal_share = 0.5 if replacements else 0.0
    return mesh


def check_as_undisturbed(mesh, whole):
    """What came of a job that was interrupted, and of one that was not."""
    max_staleness = mesh.context.spec.algorithm.max_staleness
    assert mesh.version == len(mesh.data) == len(mesh.adams) == STEPS
    assert [event.step for event in mesh.context.steps] == list(range(1, STEPS + 1))
    assert max(mesh.staleness) <= max_staleness
    # Of each group the same attempts were sampled, and the same one was trained.
    assert mesh.finished == whole.finished
    assert groups_in_order(mesh) == groups_in_order(whole)
    assert mesh.context.kept == {}
    assert {event.reason for event in mesh.context.events if isinstance(event, Warned)} <= {
        "STEP_RECOVERED"
    }
    for step, undisturbed in zip(mesh.context.steps, whole.context.steps, strict=True):
        # A recovered step took no time of its own; gaps are told of tokens that are not old.
        told = {name for name in undisturbed.metrics if name not in _OF_TIMES}
        assert {name for name in step.metrics if name not in _OF_TIMES} == told
        for name in ("reward_mean", "groups_replaced", "groups_with_equal_rewards"):
            assert step.metrics.get(name) == undisturbed.metrics.get(name)


@pytest.mark.parametrize("replacements", [0, 2])
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_job_that_is_killed_at_any_await_trains_what_it_would_have_trained(
    max_staleness, replacements
):
    whole = job_mesh(max_staleness, replacements)
    turns, _ = lived(whole)
    assert turns > 100
    if replacements:
        assert sum(step.metrics["groups_replaced"] for step in whole.context.steps) > 0
    recovered = 0
    for dies_at in range(1, turns):
        mesh = job_mesh(max_staleness, replacements)
        if not lived(mesh, dies_at)[1]:
            assert lived(mesh)[1]
        check_as_undisturbed(mesh, whole)
        recovered += "STEP_RECOVERED" in mesh.context.warnings
    assert recovered > STEPS, "some of them died in the middle of a step"


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    max_staleness=st.integers(0, 2),
    replacements=st.sampled_from([0, 1, 3]),
    lives=st.lists(st.integers(1, 150), max_size=30),
    moving=st.booleans(),
)
def test_a_job_that_is_killed_again_and_again_trains_what_it_would_have_trained(
    seed, max_staleness, replacements, lives, moving
):
    values = {
        "seed": seed,
        "sampling": {"continue_on_newest": moving and max_staleness > 0},
        "evaluation": held_out(every_steps=2),
    }
    whole = job_mesh(max_staleness, replacements, **values)
    assert lived(whole)[1]
    mesh = job_mesh(max_staleness, replacements, **values)
    for dies_at in lives:
        if lived(mesh, dies_at)[1]:
            break
    else:
        assert lived(mesh)[1]
    check_as_undisturbed(mesh, whole)
    assert mesh.context.evaluated_at == [0, 2, 3]


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_what_is_kept_is_trained_and_only_the_rest_is_sampled(max_staleness):
    """Everything of the first step but its last group is finished when the loop dies."""
    mesh = job_mesh(max_staleness, 0)
    keep = mesh.keep

    async def but_one(number, group):
        if number == 1:
            await asyncio.sleep(1e6)
        await keep(number, group)

    mesh.keep = but_one

    async def dies():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1e3):
                await mesh.run()

    simulate(dies())
    mesh.keep = keep
    admitted = (max_staleness + 1) * 2
    assert sorted(mesh.context.kept) == [n for n in range(min(admitted, 6)) if n != 1]
    draws = len(mesh.seeds)
    simulate(mesh.run())
    assert len(mesh.seeds) == draws + 1 + 6 - min(admitted, 6)
    assert len(set(mesh.seeds)) == 6


def test_a_drifting_sampler_is_not_trusted_after_a_crash_either():
    """Groups that it drew are kept, and too old to be compared again when their turn comes."""

    def drifting():
        mesh = job_mesh(2, 0, sampling={"max_logprob_gap": 0.01})
        mesh.drift = {"s1": 0.5}
        # What a step starts is there before the step is trained.
        mesh.slowness = {"sample": 0.01, "score": 0.01, "forward": 20.0}
        mesh.piece_s = 0.01
        return mesh

    whole = drifting()
    turns, _ = lived(whole)
    assert set(whole.quarantined) == {"s1"}
    for dies_at in range(1, turns, 2):
        mesh = drifting()
        if not lived(mesh, dies_at)[1]:
            is_known, drawn = "LOGPROB_GAP" in mesh.context.warnings, set(mesh.sampled_by)
            assert lived(mesh)[1]
            later = {mesh.sampled_by[token] for token in set(mesh.sampled_by) - drawn}
            assert not (is_known and "s1" in later), "it was asked again"
        assert not [t for t in mesh.trained_at if mesh.sampled_by[t] == "s1"], dies_at
        assert [event.step for event in mesh.context.steps] == list(range(1, STEPS + 1))
        assert max(mesh.staleness) <= 2


class EarlyDrift(JobMesh):
    """Only the groups that are drawn early, for the second step, show that a sampler drifts."""

    def _chunk(self, source, sampler, prompt, params):
        order = TaskOrder(TASKS, self.context.spec.seed)
        of_second = {derived_seed(11, "group", n, order.choose(n, 0).id) for n in (2, 3)}
        drifts = params.seed in of_second and "s1" not in self.in_quarantine
        return super()._chunk(source, "s1" if drifts else "s2", prompt, params)


def test_what_a_killed_loop_could_not_look_at_is_looked_at_before_it_is_too_old():
    def early():
        mesh = EarlyDrift(job_mesh(1, 0, sampling={"max_logprob_gap": 0.01}).context, seed=3)
        mesh.drift = {"s1": 0.5}
        mesh.slowness = {"sample": 0.01, "score": 0.01, "forward_backward": 30.0}
        mesh.piece_s = 0.01
        return mesh

    whole = early()
    turns, _ = lived(whole)
    assert set(whole.quarantined) == {"s1"}
    for dies_at in range(1, turns, 2):
        mesh = early()
        if not lived(mesh, dies_at)[1]:
            assert lived(mesh)[1]
        assert not [t for t in mesh.trained_at if mesh.sampled_by[t] == "s1"], dies_at
        assert mesh.version == STEPS


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_curriculum_goes_on_as_if_nothing_had_happened(max_staleness):
    """What is learned from a step is recorded with its event, once: not before, and not after."""

    def learning():
        curriculum = {"max_reward": 0.9, "revisit": 0.2}
        mesh = job_mesh(max_staleness, 0, curriculum=curriculum)
        mesh.equal_share = 0.5
        return mesh

    whole = learning()
    turns, _ = lived(whole)
    for dies_at in range(1, turns, 2):
        mesh = learning()
        if not lived(mesh, dies_at)[1]:
            assert lived(mesh)[1]
        check_as_undisturbed(mesh, whole)
        assert mesh.context.memory["tasks"] == whole.context.memory["tasks"]


def test_finished_groups_are_read_beside_the_event_loop(monkeypatch):
    context = Context(spec(algorithm={"max_staleness": 2}), pause_after=1)
    mesh = JobMesh(context)
    simulate(mesh.run())
    at = []

    def noted(body):
        at.append(threading.current_thread())
        return group_from_bytes(body)

    monkeypatch.setattr(loop, "group_from_bytes", noted)
    context.pause_after, kept = None, len(context.kept)
    mesh.latency_s = 0.0
    # Not in virtual time, where there are no threads.
    assert asyncio.run(mesh.run()).kind == "finished"
    assert len(at) == kept > 0
    assert threading.main_thread() not in at

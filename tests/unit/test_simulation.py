"""The simulator: what its parts do, and that the judge of its schedules can object."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from services.coordinator.buffer import RolloutBuffer
from services.coordinator.scheduler import ProjectPolicy, Projects, Request
from services.coordinator.scheduler.queues import Class, Queue
from services.coordinator.scheduler.quotas import Quotas
from services.coordinator.simulate import app
from services.coordinator.simulation.calibration import Calibration
from services.coordinator.simulation.clock import Clock
from services.coordinator.simulation.jobs import Lengths
from services.coordinator.simulation.metrics import jain, weighted_tokens
from services.coordinator.simulation.mixes import MIXES
from services.coordinator.simulation.policies import POLICIES
from services.coordinator.simulation.running import simulate, trainers_for, work
from services.coordinator.simulation.samplers import ModelledSampler
from services.coordinator.simulation.trace import Drawn, Marked, Trace, Trained
from services.coordinator.simulation.trainers import ModelledTrainer
from tests.fakes.schedules import faults, random_schedule

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "calibration" / "gpu.json"
TOY = Calibration(
    machine="toy",
    sources={},
    decode_tokens_per_s=[(1, 10.0), (4, 20.0)],
    prefill_s_per_token=0.5,
    load_s=3.0,
    train_s_per_token=1.0,
    train_step_s=2.0,
    fused_tokens=10,
    max_running_completions=4,
)


def drawing(starts):
    """When each completion ends, of requests begun at their times."""
    clock = Clock()
    ends = {}
    sampler = ModelledSampler(
        "s",
        clock,
        TOY,
        TOY.rates(),
        lambda ended: ends.update(dict.fromkeys(ended, clock.now)),
    )
    for at, request, lengths in starts:
        clock.at(at, lambda r=request, ls=lengths: sampler.start(r, dict(enumerate(ls))))
    while clock.step():
        pass
    return ends


def request(number, prompt=0, policy=None):
    return Request(number, "p", "base", policy, prompt, 1)


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        pytest.param([(0, request(1), [10])], {(1, 0): 1.0}, id="alone at 10 tokens/s"),
        pytest.param(
            [(0, request(1), [10, 20, 20, 20])],
            {(1, 0): 2.0} | {(1, index): 3.8 for index in (1, 2, 3)},
            id="each slower beside others",
        ),
        pytest.param([(0, request(1, prompt=4), [10])], {(1, 0): 3.0}, id="a prompt first"),
        pytest.param(
            [(0, request(1, policy=("a", 1)), [10])], {(1, 0): 4.0}, id="pulls the version"
        ),
        pytest.param(
            [(0, request(1, policy=("a", 1)), [10]), (5, request(2, policy=("a", 1)), [10])],
            {(1, 0): 4.0, (2, 0): 6.0},
            id="has the version already",
        ),
        pytest.param(
            [(0, request(1), [20]), (1, request(2, prompt=2), [10])],
            {(1, 0): 3.5, (2, 0): 3.5},
            id="a prompt stops the others",
        ),
    ],
)
def test_a_sampler_draws_at_the_calibrated_pace(starts, ends):
    assert drawing(starts) == pytest.approx(ends)


def test_a_trainer_fuses_what_waits_up_to_its_bound():
    clock = Clock()
    trainer = ModelledTrainer(clock, TOY)
    ends = {}
    for name, tokens in (("a", 4), ("b", 6), ("c", 4), ("d", 1)):
        trainer.submit(tokens, lambda began, name=name: ends.update({name: (began, clock.now)}))
    while clock.step():
        pass
    assert ends == {"a": (0, 12), "b": (0, 12), "c": (12, 19), "d": (12, 19)}


def test_machines_that_train_together_share_the_tokens():
    clock = Clock()
    ends = []
    ModelledTrainer(clock, TOY, speed=4).submit(8, lambda _: ends.append(clock.now))
    while clock.step():
        pass
    assert ends == [4]


def test_long_tails_stay_below_the_bound_and_have_the_stated_mean():
    random = Random(0)
    lengths = Lengths("lognormal", 100, 400, 10_000)
    drawn = [lengths.draw(random) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(lengths.typical, rel=0.02)
    assert sum(length > 400 for length in drawn) / len(drawn) == pytest.approx(0.01, abs=0.003)
    short = replace(lengths, max_tokens=120)
    assert max(short.draw(random) for _ in range(1000)) == 120


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_ends_the_same_work(policy):
    result = run(policy)
    trained = [one for one in result.trace.happened if isinstance(one, Trained)]
    ended = [
        one.subject
        for one in result.trace.happened
        if isinstance(one, Marked) and one.what == "ended"
    ]
    assert sorted(ended) == ["j0", "j1", "j2", "j3"]
    assert len(trained) == 4 * 8
    assert {(one.job, number) for one in trained for number, _ in one.groups} == {
        (f"j{job}", number) for job in range(4) for number in range(64)
    }


def test_the_same_seed_is_the_same_simulation():
    assert run("rollmesh").figures == run("rollmesh").figures


def test_sharing_a_fleet_beats_one_job_at_a_time():
    shared, alone = run("rollmesh").figures, run("one_at_a_time").figures
    assert shared.experiments_per_gpu_hour > alone.experiments_per_gpu_hour
    assert shared.sampler_busy > alone.sampler_busy


def test_colocated_machines_sample_and_train_in_turns():
    result = run("colocated")
    assert len(result.trace.samplers) == 3
    assert len(result.trace.trainers) == 1
    passes = result.trace.trainers[0]
    for history in result.trace.samplers.values():
        ends = [time for time, _ in history[1:]]
        drawing = [
            (begin, end) for (begin, count), end in zip(history[:-1], ends, strict=True) if count
        ]
        assert drawing
        assert not any(a < d and c < b for a, b in drawing for c, d in passes)


def test_all_machines_count_in_what_is_busy_and_in_gpu_hours():
    for policy in ("rollmesh", "colocated"):
        of = run(policy).figures
        samplers, trainers = (2, 1) if policy == "rollmesh" else (3, 3)
        busy = samplers * of.sampler_busy + trainers * of.trainer_busy
        assert of.fleet_busy == pytest.approx(busy / 3)
        gpu_hours = 3 * of.makespan_s / 3600
        assert of.experiments_per_gpu_hour == pytest.approx(4 / gpu_hours)


def test_trainers_are_as_the_work_is():
    calibration = Calibration.load(GPU)
    jobs = MIXES["mixed"](8)
    sample_s, train_s = work(jobs, calibration)
    assert work([*jobs, *jobs], calibration) == pytest.approx((2 * sample_s, 2 * train_s))
    assert [trainers_for(jobs, count, calibration) for count in (4, 5)] == [3, 3]
    assert train_s / sample_s == pytest.approx(0.64, abs=0.005)
    quick = calibration.model_copy(update={"train_s_per_token": 1e-9, "train_step_s": 0.0})
    assert trainers_for(jobs, 1, quick) == 1


def test_shares_of_time_are_shares():
    figures = run("rollmesh").figures
    assert 0 < figures.sampler_slots_loaded <= figures.sampler_busy_loaded <= 1
    assert 0 < figures.trainer_busy <= 1
    assert figures.loaded_s <= figures.makespan_s


def test_a_project_that_was_given_nothing_lowers_the_index():
    happened = [
        Marked(0.0, "submitted", "jobs/a"),
        Marked(0.0, "submitted", "jobs/b"),
        Marked(9.0, "submitted", "jobs/late"),
        Drawn(1.0, request(1), num_tokens=6, num_finished=0, left=False),
    ]
    project = request(1).project
    by_job = {"jobs/a": project, "jobs/b": "starved", "jobs/late": "late"}
    projects = Projects(ProjectPolicy(weight=2.0), {})
    assert weighted_tokens(Trace(happened), projects, by_job, until=5.0) == [3.0, 0.0]


def test_jain():
    assert jain([2, 2, 2]) == 1
    assert jain([3, 0, 0]) == pytest.approx(1 / 3)


def test_the_command_prints_a_table_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "timeline.png"
    told = CliRunner().invoke(
        app,
        ["--calibration", str(GPU), "--jobs", "2", "--samplers", "1", "--timeline", str(picture)],
    )
    assert told.exit_code == 0, told.output
    assert "2 jobs (mixed), 1 samplers" in told.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(GPU.parent.glob("*.json")), ids=lambda path: path.stem)
def test_every_figure_of_a_calibration_has_a_source(path):
    calibration = Calibration.load(path)
    assert set(calibration.sources) == set(Calibration.model_fields) - {"machine", "sources"}


# The judge objects to what is broken: each of these breaks the real parts in one way.


def objections(seeds=range(12)):
    return [found for seed in seeds for found in faults(random_schedule(seed))]


def test_the_judge_sees_a_group_that_is_too_old(monkeypatch):
    init = RolloutBuffer.__init__

    def too_many(self, *, max_staleness, **others):
        init(self, max_staleness=max_staleness + 1, **others)

    monkeypatch.setattr(RolloutBuffer, "__init__", too_many)
    assert any("versions old" in found for found in objections())


def test_the_judge_sees_a_quota_that_is_exceeded(monkeypatch):
    monkeypatch.setattr(Quotas, "fits", lambda *_: True)
    assert any("tokens in flight" in found for found in objections())


def test_the_judge_sees_who_starves(monkeypatch):
    monkeypatch.setattr(Class, "restore", lambda self, _: self._aside.clear())
    assert any("starves" in found for found in objections())


def test_the_judge_sees_who_is_overtaken_by_his_own(monkeypatch):
    monkeypatch.setattr(
        Queue, "__iter__", lambda self: reversed([*self.resumed.values(), *self.fresh.values()])
    )
    assert any("overtakes" in found for found in objections())


def run(policy):
    return simulate(
        "uniform", policy, num_jobs=4, num_samplers=2, num_trainers=1,
        calibration=Calibration.load(GPU), seed=1,
    )  # fmt: skip

"""Which jobs begin: order, quotas that hold up nobody else, and when a place is to be expected."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.scheduler import ProjectPolicy, Projects, RunningJob, WaitingJob, admit
from tests.fakes.scheduling import NOON


def waiting_of(*jobs):
    """Jobs in order of creation: project, and class or options."""
    made = []
    for order, (project, *rest) in enumerate(jobs):
        options = {"base_model": "tiny", "priority": 0} | (rest[0] if rest else {})
        made.append(WaitingJob(name=f"{project}{order}", project=project, order=order, **options))
    return made


def running_of(*jobs):
    """Jobs that run: project, and what remains."""
    return [
        RunningJob(f"running{number}", project, "tiny", remaining)
        for number, (project, remaining) in enumerate(jobs)
    ]


def verdicts(waiting, running=(), *, max_running=1, used=(), projects=None, **options):
    options = {"trained": {"tiny"}, "sampled": {"tiny"}, "now": NOON} | options
    return admit(
        waiting,
        running,
        Projects(by_id=projects or {}),
        max_running=max_running,
        used_today=lambda project: dict(used).get(project, 0),
        **options,
    )


def names(found):
    return [verdict.job.name for verdict in found]


def started(found):
    return [verdict.job.name for verdict in found if verdict.start]


LOW, HIGH = {"priority": -1}, {"priority": 1}


@pytest.mark.parametrize(
    ("waiting", "running", "order"),
    [
        pytest.param([("a",), ("a",)], [], ["a0", "a1"], id="of creation"),
        pytest.param([("a", LOW), ("a",), ("b", HIGH)], [], ["b2", "a1", "a0"], id="of class"),
        pytest.param([("a",), ("b",)], ["a"], ["b1", "a0"], id="whose project runs fewer"),
        pytest.param([("a",), ("a",), ("b",)], [], ["a0", "b2", "a1"], id="in turns"),
        pytest.param([("a",), ("heavy",)], ["a", "heavy"], ["heavy1", "a0"], id="over the weight"),
        pytest.param(
            [("a",), ("a", HIGH), ("b",)], [], ["a1", "b2", "a0"], id="counting those above"
        ),
    ],
)
@pytest.mark.parametrize("max_running", [0, 1, 5])
def test_the_order(waiting, running, order, max_running):
    projects = {"heavy": ProjectPolicy(weight=2.0)}
    running = running_of(*((project, None) for project in running))
    max_running += len(running)
    found = verdicts(waiting_of(*waiting), running, max_running=max_running, projects=projects)
    assert names(found) == order
    assert started(found) == order[: max_running - len(running)]
    found = verdicts(
        reversed(waiting_of(*waiting)), running, max_running=max_running, projects=projects
    )
    assert names(found) == order, "whatever order they are told in"


def test_jobs_wait_for_one_of_all_places_with_position_and_interval():
    running = running_of(("a", (50.0, 60.0)), ("b", (10.0, 100.0)), ("c", None))
    waiting = waiting_of(("d",), ("e",), ("f",))
    found = verdicts(waiting, running, max_running=3)
    assert [verdict.position for verdict in found] == [1, 2, 3]
    assert {verdict.rule for verdict in found} == {"MAX_RUNNING_JOBS"}
    assert found[0].reason == "3 jobs run, which is the most"
    assert [verdict.eta_s for verdict in found] == [(0.0, 60.0), (10.0, 100.0), None]


def test_places_that_are_to_be_given_up_first_are_nobodys():
    running = running_of(("a", (1.0, 2.0)), ("b", (3.0, 4.0)), ("c", (5.0, 6.0)))
    (verdict,) = verdicts(waiting_of(("d",)), running, max_running=2)
    assert verdict.eta_s == (3.0, 4.0)
    (verdict,) = verdicts(
        waiting_of(("a",)),
        running_of(("a", (1.0, 2.0)), ("a", (3.0, 4.0)), ("b", (0.0, 0.0))),
        max_running=9,
        projects={"a": ProjectPolicy(max_running_jobs=1)},
    )
    assert verdict.rule == "PROJECT_RUNNING_JOBS"
    assert verdict.eta_s == (3.0, 4.0)


RULES = {
    "NO_TRAINER": ("no trainer of 'big' serves", {"base_model": "big"}),
    "NO_SAMPLER": ("no sampler of 'new' serves", {"base_model": "new"}),
    "RETRY": ("the trainer was lost", {"retry_reason": "the trainer was lost"}),
    "PROJECT_TOKENS_PER_DAY": ("7 of 7 tokens of today are used", {}),
    "PROJECT_ADAPTERS": (
        "2 of 2 adapters of its project are there or are made for jobs that go first",
        {"needs_adapter": True},
    ),
    "PROJECT_RUNNING_JOBS": (
        "1 jobs of its project run or go first, and 1 may run",
        {},
    ),
}


def test_for_what_draws_nothing_no_sampler_has_to_serve():
    found = verdicts(waiting_of(("a", {"needs_sampler": False}), ("a",)), max_running=9, sampled=())
    assert [(verdict.start, verdict.rule) for verdict in found] == [
        (True, ""),
        (False, "NO_SAMPLER"),
    ]


@pytest.mark.parametrize("rule", RULES)
def test_what_holds_one_job_back_holds_up_no_other(rule):
    reason, options = RULES[rule]
    projects = {
        "PROJECT_TOKENS_PER_DAY": {"a": ProjectPolicy(tokens_per_day=7)},
        "PROJECT_ADAPTERS": {"a": ProjectPolicy(max_adapters=2)},
        "PROJECT_RUNNING_JOBS": {"a": ProjectPolicy(max_running_jobs=1)},
    }.get(rule, {})
    running = running_of(("a", (1.0, 2.0)))
    waiting = waiting_of(("a", HIGH | options), ("a", HIGH | options), ("b",))
    found = verdicts(
        waiting,
        running,
        max_running=2,
        projects=projects,
        used={"a": 7}.items(),
        trained={"tiny", "new"},
        num_adapters=lambda _: 2,
    )
    assert started(found) == ["b2"]
    first, second = found[:2]
    assert (first.rule, first.reason, first.position) == (rule, reason, 1)
    assert second.rule == rule
    assert second.position == (1 if rule == "RETRY" else 2)
    assert first.release
    etas = {"PROJECT_TOKENS_PER_DAY": (43200.0, 43200.0), "PROJECT_RUNNING_JOBS": (1.0, 2.0)}
    assert first.eta_s == etas.get(rule)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_jobs_start_as_long_as_there_are_places_and_never_over_a_quota(seed):
    rng = random.Random(seed)
    projects = {
        project: ProjectPolicy(
            weight=rng.choice([1.0, 3.0]),
            max_running_jobs=rng.choice([None, 1, 2]),
            tokens_per_day=rng.choice([None, 10]),
        )
        for project in "abc"
    }
    used = {project: rng.choice([0, 10]) for project in "abc"}
    max_running = rng.randint(1, 6)
    running = running_of(*((rng.choice("abc"), None) for _ in range(rng.randint(0, 4))))
    waiting = waiting_of(
        *(
            (
                rng.choice("abc"),
                {
                    "priority": rng.choice([-1, 0, 1]),
                    "base_model": rng.choice(["tiny", "tiny", "big"]),
                    "retry_reason": rng.choice(["", "", "lost"]),
                },
            )
            for _ in range(rng.randint(0, 12))
        )
    )
    found = verdicts(
        waiting, running, max_running=max_running, used=used.items(), projects=projects
    )
    assert sorted(names(found)) == sorted(job.name for job in waiting)
    counts = Counter(job.project for job in running)
    counts.update(verdict.job.project for verdict in found if verdict.start)
    idle = {project for project in "abc" if projects[project].tokens_per_day and used[project]}
    total = sum(count for project, count in counts.items() if project not in idle)
    assert total <= max(max_running, sum(job.project not in idle for job in running))
    for verdict in found:
        job, policy = verdict.job, projects[verdict.job.project]
        over_jobs = policy.max_running_jobs is not None
        over_day = policy.tokens_per_day is not None and used[job.project] >= 10
        match verdict.rule:
            case "":
                assert verdict.start
                assert not over_day
                assert not over_jobs or counts[job.project] <= policy.max_running_jobs
            case "MAX_RUNNING_JOBS":
                assert total >= max_running
            case "PROJECT_RUNNING_JOBS":
                waits = [v for v in found if v.rule == "MAX_RUNNING_JOBS"]
                first = sum(v.job.project == job.project for v in waits)
                assert counts[job.project] + first >= policy.max_running_jobs
            case "PROJECT_TOKENS_PER_DAY":
                assert over_day
            case "NO_TRAINER":
                assert job.base_model == "big"
            case "RETRY":
                assert job.retry_reason
    positions = Counter()
    for verdict in found:
        if verdict.rule == "MAX_RUNNING_JOBS":
            positions[verdict.rule] += 1
            assert verdict.position == positions[verdict.rule]


def test_what_draws_nothing_before_midnight_holds_up_no_other_project():
    projects = {"a": ProjectPolicy(tokens_per_day=10)}
    running = running_of(("a", None), ("a", None))
    for used, begun in ((9, []), (10, ["b0", "b1"])):
        found = verdicts(
            waiting_of(("b",), ("b",), ("b",)),
            running,
            max_running=2,
            used={"a": used}.items(),
            projects=projects,
        )
        assert started(found) == begun

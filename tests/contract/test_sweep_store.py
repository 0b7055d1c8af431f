"""Sweeps in the store, over every database that it promises to work on."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from rollmesh import types
from rollmesh.errors import AlreadyExists, InvalidRequest, NotFound, Overloaded
from rollmesh.job import EvaluationCompleted, JobSpec, StateChanged, StepCompleted
from rollmesh.sweep import SweepSpec, expand
from services.coordinator.store import QUEUE, NewJob, Request, check_url, open_store
from services.coordinator.store import sweeps as sweep_store
from services.coordinator.sweeps import Halver
from tests.fakes.databases import postgresql_server

LORA = types.LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",), seed=3)
S = "projects/p/sweeps/s"
J = "projects/p/jobs/s-{}".format


@pytest.fixture(scope="session")
def postgresql():
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request, tmp_path):
    """Of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/store.sqlite"
        return
    server = request.getfixturevalue("postgresql")
    engine = create_async_engine(check_url(f"{server}/postgres"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text("DROP DATABASE IF EXISTS sweeps WITH (FORCE)"))
        await connection.execute(text("CREATE DATABASE sweeps"))
    await engine.dispose()
    yield f"{server}/sweeps"


@pytest.fixture
async def store(url):
    async with open_store(url, request_retention_s=100.0) as opened:
        yield opened


def spec_of(count: int, *, halving: dict | None = None, **changes) -> SweepSpec:
    tasks = [{"fields": {"question": f"{n}+1"}} for n in range(3)]
    base = {
        "base_model": "arith",
        "dataset": {"tasks": tasks},
        "evaluation": {"dataset": {"tasks": tasks}, "every_steps": 1},
        "prompt": {"text": "{question}="},
        "reward": {"function": "even"},
        "stop": {"max_steps": 100},
        **changes,
    }
    values = {
        "base": JobSpec.model_validate(base),
        "grid": [{"path": "seed", "values": list(range(count))}],
        "halving": halving,
    }
    return SweepSpec.model_validate({key: value for key, value in values.items() if value})


async def create(
    store, count=4, *, sweep="s", request_id="r", max_pending=999, spec=None, **options
):
    spec = spec or spec_of(count, **options)
    jobs = []
    for number, variant in enumerate(expand(spec)):
        job = f"{sweep}-{number}"
        adapter = f"projects/p/adapters/{job}"
        new = await NewJob.of(
            f"projects/p/jobs/{job}", "p", variant.spec, adapter=adapter, lora=LORA
        )
        jobs.append((variant.values, new))
    return await store.sweeps.create(
        f"projects/p/sweeps/{sweep}",
        "p",
        spec,
        jobs,
        request=Request.of("p", request_id, "CreateSweep", sweep, spec.model_dump(mode="json")),
        max_pending=max_pending,
        now=1.0,
    )


async def run_to(store, number: int, step: int, reward: float | None, *, then: str = "hold"):
    """Let a job run to the end of `step`, with that reward from there on, and then stop so."""
    job = await store.jobs.command(J(number), "start", now=2.0)
    for done in range(job.step + 1, step + 1):
        metrics = {} if reward is None else {"reward_mean": reward}
        completed = StepCompleted(step=done, policy_version=done, metrics=metrics, phases={})
        await store.jobs.record(J(number), completed, now=3.0)
    if reward is not None:
        evaluation = EvaluationCompleted(step=step, reward_mean=reward, num_tasks=3, duration_s=1.0)
        await store.jobs.record(J(number), evaluation, now=4.0)
    await store.jobs.command(J(number), then, now=5.0)


def halver(store, now=9.0) -> Halver:
    return Halver(store.sweeps, store.jobs.changes, clock=lambda: now)


async def phases(store, count: int) -> list[str]:
    """Of its jobs, by number."""
    by_job = {job.job: job for job in (await store.sweeps.get(S)).jobs}
    return [by_job[J(number)].state for number in range(count)]


async def test_a_sweep_and_its_jobs_are_stored_together(store):
    made = await create(store, 3, halving={"first_step": 2, "factor": 2})

    assert made == await store.sweeps.get(S)
    assert made.state == "RUNNING"
    assert [job.job for job in made.jobs] == [J(0), J(1), J(2)]
    assert [job.values for job in made.jobs] == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    assert {(job.state, job.step, job.metric, job.rung) for job in made.jobs} == {
        ("PENDING", 0, None, 0)
    }
    # The answer is small; what runs has every task.
    assert len(made.spec.base.dataset.tasks) == 1
    loaded = await store.jobs.load(J(1))
    assert len(loaded.spec.dataset.tasks) == 3
    assert loaded.spec.seed == 1
    assert loaded.job.sweep == S
    assert loaded.hold_step == 2
    assert (await store.jobs.events(J(1), after=0)).last_event == 1


async def test_a_repeated_request_answers_the_same_sweep_and_another_one_is_refused(store):
    made = await create(store)
    assert await create(store) == made
    with pytest.raises(AlreadyExists, match="request_id"):
        await create(store, 5)
    with pytest.raises(AlreadyExists, match="there is a projects/p/sweeps/s already"):
        await create(store, request_id="another")


@pytest.mark.parametrize(
    ("there", "max_pending", "error"),
    [
        pytest.param("another", 4, Overloaded, id="more than may wait"),
        pytest.param("s-3", 9, AlreadyExists, id="a job's name is taken"),
    ],
)
async def test_all_jobs_are_made_or_none_of_them(store, there, max_pending, error):
    name = f"projects/p/jobs/{there}"
    new = await NewJob.of(name, "p", spec_of(1).base, adapter="projects/p/adapters/x", lora=LORA)
    request = Request.of("p", "one", "CreateJob", there)
    await store.jobs.create(new, request=request, max_pending=9, now=1.0)

    with pytest.raises(error):
        await create(store, max_pending=max_pending)

    assert [job.name for job in await store.jobs.page("p", limit=10, after="")] == [name]
    with pytest.raises(NotFound):
        await store.sweeps.get(S)
    with pytest.raises(NotFound):
        await store.adapters.get("projects/p/adapters/s-0")


async def test_as_many_jobs_as_may_wait_are_taken(store):
    assert len((await create(store, 4, max_pending=4)).jobs) == 4


async def test_sweeps_are_listed_newest_first_page_by_page(store):
    for name in ("a", "b", "c"):
        await create(store, 2, sweep=name, request_id=name)
    first = await store.sweeps.page("p", limit=2, after="")
    assert [sweep.name.rpartition("/")[2] for sweep in first] == ["c", "b"]
    assert {len(sweep.jobs) for sweep in first} == {0}
    second = await store.sweeps.page("p", limit=2, after="b")
    assert [sweep.name.rpartition("/")[2] for sweep in second] == ["a"]
    assert await store.sweeps.page("other", limit=2, after="") == []
    with pytest.raises(InvalidRequest, match="page_token"):
        await store.sweeps.page("p", limit=2, after="z")


async def test_nothing_happens_before_all_that_are_left_have_come_to_the_step(store):
    await create(store, 3, halving={"first_step": 2})
    await run_to(store, 0, 2, 0.1)
    await run_to(store, 1, 2, 0.2)
    assert await store.sweeps.due() == []
    await store.sweeps.settle(S, now=9.0)  # asked nevertheless
    assert await phases(store, 3) == ["PAUSED", "PAUSED", "PENDING"]


async def test_the_best_go_on_and_the_others_are_told_why_they_do_not(store):
    await create(store, 4, halving={"first_step": 2, "factor": 2})
    for number, reward in enumerate([0.1, 0.4, 0.3, 0.2]):
        await run_to(store, number, 2, reward)
    woken = [store.jobs.changes.next(topic) for topic in (QUEUE, J(0), J(1))]

    await halver(store).settle()

    assert all(event.is_set() for event in woken)
    assert await phases(store, 4) == ["CANCELLED", "PENDING", "PENDING", "CANCELLED"]
    sweep = await store.sweeps.get(S)
    assert [job.job for job in sweep.jobs] == [J(1), J(2), J(3), J(0)]
    assert [(job.rung, job.halved, job.metric) for job in sweep.jobs] == [
        (1, False, 0.4),
        (1, False, 0.3),
        (0, True, 0.2),
        (0, True, 0.1),
    ]
    out = "successive halving at step 2: evaluation 0.1 is 4th of 4, the best 2 go on"
    assert sweep.jobs[-1].state_reason == out
    events = (await store.jobs.events(J(0), after=0)).events
    assert events[-1].event == StateChanged(from_state="PAUSED", to_state="CANCELLED", reason=out)
    assert (await store.jobs.load(J(1))).hold_step == 4
    # And once more nothing.
    before = await store.sweeps.get(S)
    await halver(store).settle()
    await store.sweeps.settle(S, now=10.0)
    assert await store.sweeps.get(S) == before


async def test_a_sweep_comes_down_to_one_job_which_runs_to_its_end_unheld(store):
    await create(store, 9, halving={"first_step": 1, "factor": 3})
    for number in range(9):
        await run_to(store, number, 1, number / 10)
    await halver(store).settle()
    for number in (6, 7, 8):
        await run_to(store, number, 3, (10 - number) / 10)
    await halver(store).settle()
    assert (await phases(store, 9)).count("CANCELLED") == 8
    assert (await store.jobs.load(J(6))).hold_step is None
    await run_to(store, 6, 100, 1.0, then="finish")
    assert (await store.sweeps.get(S)).state == "ENDED"
    assert await store.sweeps.due() == [S]
    await halver(store).settle()
    assert await store.sweeps.due() == []
    sweep = await store.sweeps.get(S)
    assert (sweep.state, sweep.jobs[0].job, sweep.jobs[0].rung) == ("ENDED", J(6), 2)


async def test_of_equal_figures_the_lower_number_goes_on(store):
    await create(store, 4, halving={"first_step": 1, "factor": 4})
    for number, reward in enumerate([0.1, 0.5, 0.5, 0.5]):
        await run_to(store, number, 1, reward)
    await halver(store).settle()
    assert await phases(store, 4) == ["CANCELLED", "PENDING", "CANCELLED", "CANCELLED"]


@pytest.mark.parametrize("how", ["fail", "cancel", "finish"])
async def test_who_ends_before_the_step_is_out_and_keeps_nobody_waiting(store, how):
    await create(store, 3, halving={"first_step": 2, "factor": 2})
    await run_to(store, 0, 2, 0.1)
    await run_to(store, 1, 2, 0.2)
    await run_to(store, 2, 1, 0.9, then=how)
    await halver(store).settle()
    states = await phases(store, 3)
    assert states[:2] == ["CANCELLED", "PENDING"]
    out = {job.job: job for job in (await store.sweeps.get(S)).jobs}[J(2)]
    assert not out.halved
    assert out.rung == 0


async def test_a_job_that_never_was_measured_is_behind_all_others(store):
    await create(store, 3, halving={"first_step": 1, "factor": 3})
    for number, reward in enumerate([None, -1.0, None]):
        await run_to(store, number, 1, reward)
    await halver(store).settle()
    assert await phases(store, 3) == ["CANCELLED", "PENDING", "CANCELLED"]


async def test_the_mean_reward_counts_from_the_comparison_before(store):
    await create(store, 4, halving={"first_step": 2, "factor": 2, "metric": "reward"})
    for number, reward in enumerate([0.0, 0.9, 0.8, 0.1]):
        await run_to(store, number, 2, reward)
    await halver(store).settle()
    await run_to(store, 1, 4, 0.2)  # 0.55 over all four steps, where the other has 0.7
    await run_to(store, 2, 4, 0.6)
    metrics = {job.job: job.metric for job in (await store.sweeps.get(S)).jobs}
    assert metrics == {
        J(0): 0.0,
        J(1): pytest.approx(0.2),
        J(2): pytest.approx(0.6),
        J(3): pytest.approx(0.1),
    }
    await halver(store).settle()
    assert await phases(store, 4) == ["CANCELLED", "CANCELLED", "PENDING", "CANCELLED"]


async def test_winners_stay_above_losers_with_the_figure_they_were_compared_by(store):
    await create(store, 4, halving={"first_step": 2, "factor": 2, "metric": "reward"})
    for number, reward in enumerate([0.1, 0.4, 0.2, 0.3]):
        await run_to(store, number, 2, reward)
    await halver(store).settle()
    told = [(job.job, job.rung, job.metric) for job in (await store.sweeps.get(S)).jobs]
    assert told == [
        (J(1), 1, pytest.approx(0.4)),
        (J(3), 1, pytest.approx(0.3)),
        (J(2), 0, pytest.approx(0.2)),
        (J(0), 0, pytest.approx(0.1)),
    ]
    # Not by what they were compared by before: one of them has nothing since.
    await run_to(store, 1, 4, None)
    await run_to(store, 3, 4, 0.05)
    await halver(store).settle()
    assert await phases(store, 4) == ["CANCELLED", "CANCELLED", "CANCELLED", "PENDING"]


async def test_rewards_are_told_once_events_are_gone_and_count_no_figures_that_are_none(store):
    await create(store, 2, halving={"first_step": 9, "factor": 2, "metric": "reward"})
    for number, last in ((0, 0.75), (1, None)):
        await run_to(store, number, 1, 0.25 if last else None, then="pause")
        await store.jobs.command(J(number), "resume", now=5.0)
        await run_to(store, number, 2, last, then="pause")
        await store.jobs.command(J(number), "resume", now=5.0)
        await store.jobs.command(J(number), "start", now=5.0)
        nothing = StepCompleted(
            step=3, policy_version=3, metrics={"reward_mean": float("nan")}, phases={}
        )
        await store.jobs.record(J(number), nothing, now=5.0)
        await store.jobs.command(J(number), "cancel", now=5.0)
    while await store.events.drop_of_ended(before=99.0):
        pass
    assert len((await store.jobs.events(J(0), after=0)).events) == 1
    metrics = {job.job: job.metric for job in (await store.sweeps.get(S)).jobs}
    assert metrics == {J(0): 0.5, J(1): None}


async def test_nobody_is_ended_where_nobody_has_a_figure(store):
    await create(store, 4, halving={"first_step": 1, "factor": 3, "metric": "reward"})
    await run_to(store, 0, 1, 0.9, then="cancel")
    for number in (1, 2, 3):
        await run_to(store, number, 1, None)
    await halver(store).settle()
    assert await phases(store, 4) == ["CANCELLED", "PENDING", "PENDING", "PENDING"]
    assert (await store.jobs.load(J(1))).hold_step == 3
    # Who went on is above who did not, with a figure or without one.
    assert [job.job for job in (await store.sweeps.get(S)).jobs] == [J(1), J(2), J(3), J(0)]


async def test_jobs_that_may_hold_adapters_for_others_are_counted(store):
    await create(store, 3, halving={"first_step": 1, "factor": 2, "metric": "reward"})
    await create(store, 2, sweep="free", request_id="free")
    assert await store.sweeps.comparing() == {("p", "arith"): 3}
    for number in range(3):
        await run_to(store, number, 1, number / 10)
    await halver(store).settle()
    assert await store.sweeps.comparing() == {("p", "arith"): 2}
    await store.sweeps.cancel(S, now=9.0)
    assert await store.sweeps.comparing() == {}


async def test_jobs_without_evaluations_are_shown_with_their_newest_reward(store):
    await create(store, 2, evaluation=None)
    await run_to(store, 1, 3, 0.5, then="finish")
    (first, second) = (await store.sweeps.get(S)).jobs
    assert (first.job, first.metric) == (J(1), 0.5)
    assert (second.job, second.metric) == (J(0), None)


async def test_its_user_cannot_take_a_held_job_past_the_step(store):
    await create(store, 2, halving={"first_step": 1, "factor": 2})
    await run_to(store, 0, 1, 0.9)
    assert (await store.jobs.command(J(0), "resume", now=6.0)).state == "PAUSED"
    assert J(0) not in [job.name for job in await store.jobs.queue()]
    assert (await store.jobs.load(J(0))).hold_step == 1


async def test_a_job_that_its_user_paused_is_waited_for(store):
    await create(store, 2, halving={"first_step": 1, "factor": 2})
    await run_to(store, 0, 1, 0.1)
    await run_to(store, 1, 1, 0.2)
    await store.jobs.command(J(1), "pause", now=6.0)
    await halver(store).settle()
    assert await phases(store, 2) == ["PAUSED", "PAUSED"]
    await store.jobs.command(J(1), "resume", now=7.0)
    await store.jobs.command(J(1), "start", now=7.0)
    await store.jobs.command(J(1), "hold", now=8.0)
    await halver(store).settle()
    assert await phases(store, 2) == ["CANCELLED", "PENDING"]


@pytest.mark.parametrize("calls", range(1, 5))
async def test_a_death_in_the_middle_of_a_comparison_leaves_nothing_of_it(
    store, monkeypatch, calls
):
    await create(store, 4, halving={"first_step": 1, "factor": 2})
    for number in range(4):
        await run_to(store, number, 1, number / 10)
    before = await store.sweeps.get(S)
    apply, made = sweep_store.apply, []

    async def dies(*arguments, **options):
        if len(made) == calls - 1:
            raise ConnectionResetError
        made.append(arguments)
        await apply(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_store, "apply", dies)
        with pytest.raises(ConnectionResetError):
            await halver(store).settle()
    assert await store.sweeps.get(S) == before

    await halver(store).settle()

    assert await phases(store, 4) == ["CANCELLED", "CANCELLED", "PENDING", "PENDING"]


async def test_two_that_compare_at_once_do_it_once(store):
    await create(store, 4, halving={"first_step": 1, "factor": 2})
    for number in range(4):
        await run_to(store, number, 1, number / 10)
    await asyncio.gather(*(store.sweeps.settle(S, now=9.0) for _ in range(4)))
    assert await phases(store, 4) == ["CANCELLED", "CANCELLED", "PENDING", "PENDING"]
    assert {job.rung for job in (await store.sweeps.get(S)).jobs} == {0, 1}
    assert (await store.jobs.events(J(0), after=0)).last_event == 6


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)  # SQLite has one writer at a time
async def test_what_a_user_does_during_a_comparison_is_done_after_it(store, url, monkeypatch):
    await create(store, 2, halving={"first_step": 1, "factor": 2})
    await run_to(store, 0, 1, 0.1)
    await run_to(store, 1, 1, 0.2)
    apply, pauses = sweep_store.apply, []
    engine = create_async_engine(check_url(url))
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")

    async def pause_waits() -> bool:
        async with engine.connect() as connection:
            return bool((await connection.execute(waiting)).scalar_one())

    async def meanwhile(*arguments, **options):
        if not pauses:
            pauses.append(asyncio.create_task(store.jobs.command(J(1), "pause", now=9.0)))
            async with asyncio.timeout(20):
                while not (pauses[0].done() or await pause_waits()):
                    await asyncio.sleep(0.01)
        await apply(*arguments, **options)

    monkeypatch.setattr(sweep_store, "apply", meanwhile)
    await halver(store).settle()
    await pauses[0]
    await engine.dispose()

    assert await phases(store, 2) == ["CANCELLED", "PAUSED"]
    assert {job.rung for job in (await store.sweeps.get(S)).jobs} == {0, 1}


async def test_to_cancel_a_sweep_cancels_what_has_not_ended_and_leaves_the_rest(store):
    await create(store, 3, halving={"first_step": 2})
    await run_to(store, 0, 1, 0.5, then="finish")
    await run_to(store, 1, 2, 0.5)

    cancelled = await store.sweeps.cancel(S, now=9.0)

    assert cancelled.state == "CANCELLED"
    assert await phases(store, 3) == ["SUCCEEDED", "CANCELLED", "CANCELLED"]
    assert await store.sweeps.cancel(S, now=10.0) == cancelled
    assert await store.sweeps.due() == []
    with pytest.raises(NotFound):
        await store.sweeps.cancel("projects/p/sweeps/other", now=9.0)


async def test_a_sweep_that_has_ended_is_not_cancelled_any_more(store):
    await create(store, 1)
    await run_to(store, 0, 1, 0.5, then="finish")
    assert (await store.sweeps.cancel(S, now=9.0)).state == "ENDED"


async def test_without_halving_jobs_are_held_nowhere(store):
    await create(store, 2)
    assert (await store.jobs.load(J(0))).hold_step is None

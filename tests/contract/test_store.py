"""One suite for the store, over every database that it promises to work on."""

from __future__ import annotations

import asyncio
import math
import sqlite3

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from rollmesh import types
from rollmesh.errors import (
    AlreadyExists,
    DigestMismatch,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from rollmesh.job import (
    DatasetSpec,
    EvaluationCompleted,
    EvaluationSpec,
    JobSpec,
    StateChanged,
    StepCompleted,
    Task,
    Warned,
)
from services.coordinator.store import QUEUE, Request, StoreUnavailable, check_url, open_store
from services.coordinator.store.tables import metadata
from tests.fakes.databases import postgresql_server

LORA = types.LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",), seed=3)
RETENTION_S = 100.0


@pytest.fixture(scope="session")
def postgresql():
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request, tmp_path):
    """Of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/new/folder/store.sqlite"
        return
    server = request.getfixturevalue("postgresql")
    engine = create_async_engine(check_url(f"{server}/postgres"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text("DROP DATABASE IF EXISTS store WITH (FORCE)"))
        await connection.execute(text("CREATE DATABASE store"))
    await engine.dispose()
    yield f"{server}/store"


@pytest.fixture
async def store(url):
    async with open_store(url, request_retention_s=RETENTION_S) as opened:
        yield opened


def spec_of(**changes) -> JobSpec:
    tasks = [Task(fields={"question": f"{n}+1", "answer": str(n + 1)}) for n in range(3)]
    values = {
        "base_model": "arith",
        "adapter": {"id": "a"},
        "dataset": DatasetSpec(tasks=tasks),
        "evaluation": EvaluationSpec(dataset=DatasetSpec(tasks=tasks)),
        "prompt": {"text": "{question}="},
        "reward": {"function": "exact_match", "reference": "{answer}"},
        "stop": {"max_steps": 3},
    }
    return JobSpec.model_validate({**values, **changes})


async def create(
    store, job="j", *, adapter=None, request_id=None, spec=None, now=1.0, max_pending=9, project="p"
):
    spec = spec or spec_of()
    return await store.jobs.create(
        f"projects/{project}/jobs/{job}",
        project,
        spec,
        adapter=f"projects/{project}/adapters/{adapter or job}",
        lora=LORA,
        request=Request.of(project, request_id or job, "CreateJob", job, spec.model_dump()),
        max_pending=max_pending,
        now=now,
    )


async def events(store, job="projects/p/jobs/j", after=0):
    return (await store.jobs.events(job, after=after)).events


J = "projects/p/jobs/j"
A = "projects/p/adapters/a"


def step(number: int, **metrics: float) -> StepCompleted:
    return StepCompleted(step=number, policy_version=number, metrics=metrics, phases={"step": 1.0})


def evaluation(number: int, reward: float) -> EvaluationCompleted:
    return EvaluationCompleted(step=number, reward_mean=reward, num_tasks=3, duration_s=0.5)


@pytest.mark.usefixtures("store")
async def test_the_migrations_make_the_schema_that_the_code_uses(url):
    engine = create_async_engine(check_url(url))
    async with engine.connect() as connection:
        differences = await connection.run_sync(
            lambda sync: compare_metadata(
                MigrationContext.configure(sync, opts={"compare_type": True}), metadata
            )
        )
    await engine.dispose()
    assert differences == []


async def test_a_second_start_finds_what_the_first_left(url):
    async with open_store(url, request_retention_s=RETENTION_S) as first:
        made = await create(first)
    async with open_store(url, request_retention_s=RETENTION_S) as second:
        assert await second.jobs.get(J) == made


async def test_a_database_of_a_newer_build_is_refused(url):
    async with open_store(url, request_retention_s=RETENTION_S):
        pass
    engine = create_async_engine(check_url(url))
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await engine.dispose()
    with pytest.raises(FailedPrecondition, match="schema"):
        async with open_store(url, request_retention_s=RETENTION_S):
            pass


@pytest.mark.parametrize("bad", ["", "nonsense", "mysql://u@h/d", "oracle://x"])
def test_a_url_of_another_database_is_refused(bad):
    with pytest.raises(InvalidRequest, match="sqlite:///"):
        check_url(bad)


class TestJobs:
    async def test_a_new_job_is_pending_with_its_first_event(self, store):
        job = await create(store, now=5.0)
        assert (job.state, job.step, job.adapter, job.last_event) == ("PENDING", 0, "", 1)
        assert (job.create_time, job.update_time) == (5.0, 5.0)
        (first,) = await events(store)
        assert (first.number, first.time) == (1, 5.0)
        assert first.event == StateChanged(from_state=None, to_state="PENDING")

    async def test_what_is_shown_has_defaults_and_the_first_tasks_only(self, store):
        await create(store)
        shown = (await store.jobs.get(J)).spec
        assert len(shown.dataset.tasks) == len(shown.evaluation.dataset.tasks) == 1
        assert "group_size" in shown.algorithm.model_fields_set
        assert len((await store.jobs.load(J)).spec.dataset.tasks) == 3

    async def test_a_repeated_request_answers_the_first_job_and_makes_no_other(self, store):
        first = await create(store)
        assert await create(store, now=9.0) == first
        assert len(await store.jobs.page("p", limit=9, after="")) == 1

    async def test_the_same_request_many_times_at_once_makes_one_job(self, store):
        made = await asyncio.gather(*(create(store) for _ in range(8)))
        assert len({job.name for job in made}) == 1
        assert len(await events(store)) == 1

    async def test_a_request_id_for_another_job_is_refused(self, store):
        await create(store, request_id="r")
        with pytest.raises(AlreadyExists, match="request_id"):
            await create(store, "k", request_id="r")

    async def test_projects_do_not_meet_in_their_request_ids(self, store):
        await create(store, request_id="r")
        other = await create(store, "k", request_id="r", project="q")
        assert other.name == "projects/q/jobs/k"

    async def test_a_request_id_is_forgotten_after_its_retention(self, store):
        await create(store, request_id="r", now=0.0)
        await create(store, "k", now=RETENTION_S + 1)  # forgets
        with pytest.raises(AlreadyExists, match=J):  # and so this is no repeat
            await create(store, request_id="r")

    async def test_a_name_is_never_given_twice(self, store):
        await create(store)
        with pytest.raises(AlreadyExists, match=J):
            await create(store, request_id="another")

    async def test_two_jobs_cannot_want_the_same_adapter(self, store):
        await create(store, adapter="a")
        with pytest.raises(AlreadyExists, match=A):
            await create(store, "k", adapter="a")
        with pytest.raises(NotFound):  # nothing is left of it
            await store.jobs.get("projects/p/jobs/k")

    async def test_an_adapter_that_never_came_to_be_is_free_once_its_job_has_ended(self, store):
        await create(store, adapter="a")
        await store.jobs.command(J, "cancel", now=2.0)
        await create(store, "k", adapter="a")
        assert (await store.adapters.get(A)).adapter.job == "projects/p/jobs/k"

    async def test_more_waiting_jobs_than_allowed_are_refused(self, store):
        await create(store, "j", max_pending=2)
        await create(store, "k", max_pending=2)
        with pytest.raises(Overloaded, match="max_pending_jobs"):
            await create(store, "l", max_pending=2)
        await store.jobs.command(J, "start", now=2.0)
        await create(store, "l", max_pending=2)

    async def test_pages_are_newest_first_and_miss_nothing_that_was_there(self, store):
        for number in range(5):
            await create(store, f"j{number}")
        await create(store, "other", project="q")
        first = await store.jobs.page("p", limit=2, after="")
        await create(store, "newer")
        second = await store.jobs.page("p", limit=9, after="j3")
        ids = [job.name.rpartition("/")[2] for job in [*first, *second]]
        assert ids == ["j4", "j3", "j2", "j1", "j0"]

    async def test_a_page_token_that_nobody_gave_is_refused(self, store):
        with pytest.raises(InvalidRequest, match="page_token"):
            await store.jobs.page("p", limit=2, after="nope")

    async def test_a_command_moves_the_job_and_tells_it(self, store):
        await create(store)
        job = await store.jobs.command(J, "start", now=2.0)
        assert (job.state, job.update_time) == ("RUNNING", 2.0)
        job = await store.jobs.command(J, "fail", now=3.0, reason="no such reward")
        assert (job.state, job.state_reason) == ("FAILED", "no such reward")
        assert [event.event for event in await events(store, after=1)] == [
            StateChanged(from_state="PENDING", to_state="RUNNING"),
            StateChanged(from_state="RUNNING", to_state="FAILED", reason="no such reward"),
        ]

    async def test_asking_for_a_pause_is_no_event_until_the_job_is_paused(self, store):
        await create(store)
        await store.jobs.command(J, "start", now=2.0)
        job = await store.jobs.command(J, "pause", now=3.0)
        assert job.state == "RUNNING"
        assert "pauses" in job.state_reason
        assert len(await events(store)) == 2
        assert (await store.jobs.command(J, "settle", now=4.0)).state == "PAUSED"
        assert len(await events(store)) == 3

    async def test_a_command_that_does_not_fit_changes_nothing(self, store):
        await create(store)
        await store.jobs.command(J, "cancel", now=2.0)
        ended = await store.jobs.get(J)
        with pytest.raises(FailedPrecondition, match="CANCELLED"):
            await store.jobs.command(J, "resume", now=3.0)
        assert await store.jobs.get(J) == ended

    @pytest.mark.parametrize("method", ["get", "load", "command", "record", "events"])
    async def test_a_job_that_is_not_there_is_not_found(self, store, method):
        calls = {
            "get": lambda: store.jobs.get(J),
            "load": lambda: store.jobs.load(J),
            "command": lambda: store.jobs.command(J, "cancel", now=1.0),
            "record": lambda: store.jobs.record(J, step(1), now=1.0),
            "events": lambda: store.jobs.events(J, after=0),
        }
        with pytest.raises(NotFound, match=J):
            await calls[method]()

    async def test_the_event_that_ends_a_step_says_whether_a_pause_was_asked_for_in_it(self, store):
        await create(store)
        await store.jobs.command(J, "start", now=1.0)
        told = [await store.jobs.record(J, step(1), now=2.0)]
        await store.jobs.command(J, "pause", now=3.0)
        told.append(await store.jobs.record(J, step(2), now=4.0))
        await store.jobs.command(J, "resume", now=5.0)
        told.append(await store.jobs.record(J, step(3), now=6.0))
        assert told == [False, True, False]

    async def test_events_change_what_the_job_says(self, store):
        await create(store)
        await store.jobs.command(J, "start", now=1.0)
        happenings = [
            evaluation(0, 0.25),
            Warned(reason="SAMPLER_UNAVAILABLE", message="one is gone"),
            step(1, loss=math.nan, reward_mean=0.5),
            evaluation(1, 0.75),
        ]
        for number, happening in enumerate(happenings):
            await store.jobs.record(J, happening, now=2.0 + number)
        job = await store.jobs.get(J)
        assert (job.step, job.update_time, job.last_event) == (1, 5.0, 6)
        assert job.first_evaluation == evaluation(0, 0.25)
        assert job.last_evaluation == evaluation(1, 0.75)
        assert math.isnan(job.metrics.pop("loss"))
        assert job.metrics == {"reward_mean": 0.5}
        stored = await events(store, after=2)
        assert [event.number for event in stored] == [3, 4, 5, 6]
        assert [repr(event.event) for event in stored] == [repr(h) for h in happenings]

    @pytest.mark.parametrize("command", ["fail", "cancel", "finish"])
    async def test_nothing_happens_to_a_job_after_its_end(self, store, command):
        await create(store)
        await store.jobs.command(J, "start", now=1.0)
        await store.jobs.command(J, command, now=2.0)
        with pytest.raises(FailedPrecondition):
            await store.jobs.record(J, step(1), now=3.0)
        assert isinstance((await events(store))[-1].event, StateChanged)

    async def test_concurrent_writers_leave_no_gap_in_the_numbers(self, store):
        await create(store)
        await store.jobs.command(J, "start", now=1.0)
        await asyncio.gather(
            *(store.jobs.record(J, step(number), now=2.0) for number in range(1, 31)),
            store.jobs.command(J, "pause", now=2.0),
            store.jobs.explain(J, "waits", now=2.0),
        )
        assert [event.number for event in await events(store)] == list(range(1, 33))
        assert (await store.jobs.get(J)).last_event == 32

    async def test_the_queue_is_what_ran_first_and_then_the_order_of_creation(self, store):
        for name in ("a", "b", "c", "d", "e"):
            await create(store, name)
        await store.jobs.command("projects/p/jobs/c", "start", now=1.0)
        await store.jobs.command("projects/p/jobs/b", "cancel", now=1.0)
        await store.jobs.command("projects/p/jobs/d", "pause", now=1.0)
        queue = await store.jobs.queue()
        assert [(job.name[-1], job.phase) for job in queue] == [
            ("c", "RUNNING"),
            ("a", "PENDING"),
            ("e", "PENDING"),
        ]

    async def test_whoever_waits_for_a_job_is_woken_by_its_events_alone(self, store):
        await create(store)
        await create(store, "k")
        await store.jobs.command(J, "start", now=1.0)
        queue, other = store.jobs.changes.next(QUEUE), store.jobs.changes.next("projects/p/jobs/k")
        mine = store.jobs.changes.next(J)
        await store.jobs.record(J, step(1), now=1.0)
        assert (mine.is_set(), queue.is_set(), other.is_set()) == (True, False, False)
        await store.jobs.command(J, "cancel", now=1.0)
        assert queue.is_set()


class TestAdapters:
    async def reserve(self, store, *, job="", request_id="r", lora=LORA):
        return await store.adapters.reserve(
            A,
            "arith",
            lora,
            job=job,
            request=None if job else Request.of("p", request_id, "CreateAdapter", lora.rank),
            now=1.0,
        )

    async def ready(self, store, *, job=""):
        await self.reserve(store, job=job)
        await store.adapters.place(A, "trainer:1")
        made = types.TrainerAdapter(A, LORA, 0, 1, has_pending_gradients=False)
        return await store.adapters.confirm(A, job=job, made=made)

    async def test_an_adapter_is_there_once_its_trainer_has_it(self, store):
        reserved = await self.reserve(store)
        assert not reserved.ready
        assert await store.adapters.page("p", limit=9, after="") == []
        stored = await self.ready(store)
        assert (stored.ready, stored.trainer, stored.owned) == (True, "trainer:1", False)
        assert stored.adapter.lora == LORA
        assert await store.adapters.page("p", limit=9, after="") == [stored.adapter]

    async def test_a_repeated_request_answers_the_first_adapter(self, store):
        stored = await self.ready(store)
        assert await self.reserve(store) == stored
        with pytest.raises(AlreadyExists, match="request_id"):
            await self.reserve(store, lora=types.LoraConfig(rank=8))
        with pytest.raises(AlreadyExists, match=A):
            await self.reserve(store, request_id="another")

    async def test_what_no_trainer_took_can_be_asked_for_again(self, store):
        await self.reserve(store)
        await store.adapters.release(A)
        with pytest.raises(NotFound):
            await store.adapters.get(A)
        await self.reserve(store)

    async def test_a_creation_that_died_can_be_taken_over(self, store):
        await self.reserve(store)
        await store.adapters.place(A, "trainer:1")
        lora = types.LoraConfig(rank=8)
        taken = await self.reserve(store, request_id="another", lora=lora)
        # Where the first one may have left a copy is still known.
        assert (taken.adapter.lora.rank, taken.trainer) == (8, "trainer:1")
        made = types.TrainerAdapter(A, lora, 0, 1, has_pending_gradients=False)
        await store.adapters.confirm(A, job="", made=made)
        with pytest.raises(AlreadyExists, match=A):  # the first request is no repeat of anything
            await self.reserve(store)

    async def test_a_job_that_has_not_ended_owns_its_adapter(self, store):
        await create(store, adapter="a")
        stored = await self.ready(store, job=J)
        assert stored.owned
        assert (await store.jobs.get(J)).adapter == A
        with pytest.raises(FailedPrecondition, match=J):
            await store.adapters.delete(A, Request.of("p", "d", "DeleteAdapter"), now=1.0)
        await store.jobs.command(J, "cancel", now=2.0)
        assert not (await store.adapters.get(A)).owned

    async def test_an_adapter_reserved_for_a_job_is_nobody_elses(self, store):
        await create(store, adapter="a")
        with pytest.raises(AlreadyExists, match=A):
            await self.reserve(store)
        with pytest.raises(AlreadyExists, match=A):
            await store.adapters.confirm(
                A, job="", made=types.TrainerAdapter(A, LORA, 0, 1, has_pending_gradients=False)
            )

    async def test_late_notes_of_earlier_ops_change_nothing(self, store):
        await self.ready(store)
        await store.adapters.seen(A, next_sequence=3, policy_version=1)
        await store.adapters.seen(A, next_sequence=2)
        adapter = (await store.adapters.get(A)).adapter
        assert (adapter.next_sequence, adapter.policy_version) == (3, 1)

    async def test_versions_are_kept_and_never_change(self, store):
        await self.ready(store)
        with pytest.raises(NotFound, match="yet"):
            await store.adapters.version(A, None)
        zero, one = types.PublishedVersion(0, "00"), types.PublishedVersion(1, "11")
        for version in (zero, one, one, zero):
            await store.adapters.publish(A, version, now=1.0)
        assert await store.adapters.version(A, None) == one
        assert await store.adapters.version(A, 0) == zero
        adapter = (await store.adapters.get(A)).adapter
        assert (adapter.published_version, adapter.published_digest) == (1, "11")
        with pytest.raises(NotFound, match="newest is 1"):
            await store.adapters.version(A, 2)
        with pytest.raises(DigestMismatch):
            await store.adapters.publish(A, types.PublishedVersion(1, "ff"), now=1.0)

    async def test_a_deleted_adapter_takes_its_versions_along(self, store):
        await self.ready(store)
        await store.adapters.publish(A, types.PublishedVersion(0, "00"), now=1.0)
        request = Request.of("p", "d", "DeleteAdapter", A)
        assert not await store.adapters.repeated(request)
        await store.adapters.delete(A, request, now=1.0)
        assert await store.adapters.repeated(request)
        with pytest.raises(NotFound):
            await store.adapters.version(A, None)

    async def test_names_are_in_the_order_of_their_bytes(self, store):
        names = ["a", "a-b", "a0", "ab", "a-", "b"]
        for name in [name for name in names if not name.endswith("-")]:
            await create(store, f"j{name}", adapter=name)
            full = f"projects/p/adapters/{name}"
            made = types.TrainerAdapter(full, LORA, 0, 1, has_pending_gradients=False)
            await store.adapters.confirm(full, job=f"projects/p/jobs/j{name}", made=made)
        first = await store.adapters.page("p", limit=2, after="")
        rest = await store.adapters.page("p", limit=9, after="a-b")
        ids = [adapter.name.rpartition("/")[2] for adapter in [*first, *rest]]
        assert ids == sorted(ids) == ["a", "a-b", "a0", "ab", "b"]


async def test_a_database_that_cannot_be_written_says_so_and_nothing_is_changed(tmp_path):
    path = tmp_path / "store.sqlite"
    async with open_store(f"sqlite:///{path}", request_retention_s=RETENTION_S) as store:
        await create(store)
        before = await store.jobs.get(J)
        holder = sqlite3.connect(path)
        holder.execute(
            "CREATE TRIGGER full BEFORE INSERT ON job_events "
            "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
        holder.close()
        with pytest.raises(Exception, match="disk full"):
            await store.jobs.command(J, "start", now=2.0)
        assert await store.jobs.get(J) == before


async def test_a_database_that_is_away_is_unavailable():
    with pytest.raises(StoreUnavailable, match="does not answer"):
        async with open_store("postgresql://u@127.0.0.1:1/x", request_retention_s=RETENTION_S):
            pass

"""One suite for the store, over every database that it promises to work on."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import sqlite3
import time
from functools import partial
from itertools import pairwise

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
    Fenced,
    InvalidRequest,
    NotFound,
    Overloaded,
    SequenceGap,
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
from services.coordinator.store import (
    QUEUE,
    JournaledOp,
    LetGo,
    NewJob,
    Request,
    StoreUnavailable,
    check_url,
    open_store,
    versions,
)
from services.coordinator.store.database import Database
from services.coordinator.store.migrate import migrate
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
    new = await NewJob.of(
        f"projects/{project}/jobs/{job}",
        project,
        spec,
        adapter=f"projects/{project}/adapters/{adapter or job}",
        lora=LORA,
    )
    return await store.jobs.create(
        new,
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


async def test_a_database_of_the_build_before_keeps_all_that_it_has(url):
    database = Database(url)
    await database.transact(lambda connection: migrate(connection, "0001"))

    async def fill(connection):
        values = {"name": A, "lora": '{"rank": 4, "target_modules": []}'}
        await connection.execute(
            text(
                "INSERT INTO adapters (name, project, base_model, lora, trainer, ready, "
                "policy_version, next_sequence, published_digest, create_time) "
                "VALUES (:name, 'p', 'm', :lora, 't:1', true, 3, 7, 'd', 1.0)"
            ),
            values,
        )
        await connection.execute(
            text(
                "INSERT INTO versions (adapter, policy_version, digest, create_time) "
                "VALUES (:name, 3, 'd', 1.0)"
            ),
            {"name": A},
        )

    await database.transact(fill)
    await database.close()
    async with open_store(url, request_retention_s=RETENTION_S) as store:
        stored = await store.adapters.get(A)
        assert (stored.adapter.next_sequence, stored.epoch) == (7, 0)
        assert "journaled" in stored.problem
        assert await store.versions.get(A, 3) == types.PublishedVersion(3, "d")


async def test_versions_of_the_build_before_are_kept_as_if_superseded_at_the_upgrade(url):
    database = Database(url)
    await database.transact(lambda connection: migrate(connection, "0002"))
    before = time.time()

    async def fill(connection):
        await connection.execute(
            text(
                "INSERT INTO adapters (name, project, base_model, lora, trainer, ready, "
                "policy_version, next_sequence, published_version, published_digest, create_time) "
                "VALUES (:name, 'p', 'm', :lora, 't:1', true, 3, 7, 3, 'd3', 1.0)"
            ).bindparams(name=A, lora='{"rank": 4, "target_modules": []}')
        )
        for number in range(1, 4):
            await connection.execute(
                text(
                    "INSERT INTO versions (adapter, policy_version, digest, create_time) "
                    "VALUES (:name, :number, :digest, 1.0)"
                ).bindparams(name=A, number=number, digest=f"d{number}")
            )

    await database.transact(fill)
    await database.close()
    async with open_store(url, request_retention_s=RETENTION_S) as store:
        kept = await store.versions.since(A, 0)
        assert kept == {n: types.PublishedVersion(n, f"d{n}") for n in range(1, 4)}
        let_go = partial(store.versions.let_go, max_superseded=9)
        assert await let_go(superseded_before=before, now=before) == []
        later = time.time()
        gone = await let_go(superseded_before=later, now=later)
        assert [each.policy_version for each in gone] == [1, 2]


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

    async def test_the_queue_tells_for_which_jobs_something_is_drawn(self, store):
        shown = spec_of(sft={"completion": "{answer}"}, evaluation=None)
        await create(store, "a", spec=shown)
        await create(store, "b")
        assert [job.needs_sampler for job in await store.jobs.queue()] == [False, True]

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
        await store.adapters.give(await store.adapters.get(A), "trainer:1", now=1.0)
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
        await store.adapters.give(await store.adapters.get(A), "trainer:1", now=1.0)
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

    async def test_versions_are_kept_and_never_change(self, store):
        await self.ready(store)
        with pytest.raises(NotFound, match="yet"):
            await store.versions.get(A, None)
        zero, one = types.PublishedVersion(0, "00"), types.PublishedVersion(1, "11")
        for version in (zero, one, one, zero):
            await store.versions.publish(A, version, now=1.0)
        assert await store.versions.get(A, None) == one
        assert await store.versions.get(A, 0) == zero
        adapter = (await store.adapters.get(A)).adapter
        assert (adapter.published_version, adapter.published_digest) == (1, "11")
        with pytest.raises(NotFound, match="not published; the newest is 1"):
            await store.versions.get(A, 2)
        with pytest.raises(DigestMismatch):
            await store.versions.publish(A, types.PublishedVersion(1, "ff"), now=1.0)

    async def test_a_deleted_adapter_takes_its_versions_along(self, store):
        await self.ready(store)
        await store.versions.publish(A, types.PublishedVersion(0, "00"), now=1.0)
        request = Request.of("p", "d", "DeleteAdapter", A)
        assert not await store.adapters.repeated(request)
        await store.adapters.delete(A, request, now=1.0)
        assert await store.adapters.repeated(request)
        with pytest.raises(NotFound):
            await store.versions.get(A, None)

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


class TestOps:
    """The journal of one adapter, which `trainer:1` owns."""

    @pytest.fixture
    async def epoch(self, store):
        request = Request.of("p", "a", "CreateAdapter", A)
        stored = await store.adapters.reserve(A, "arith", LORA, job="", request=request, now=1.0)
        stored = await store.adapters.give(stored, "trainer:1", now=1.0)
        made = types.TrainerAdapter(A, LORA, 0, 1, has_pending_gradients=False)
        await store.adapters.confirm(A, job="", made=made)
        return stored.epoch

    def op(self, sequence, digest="d"):
        return JournaledOp(A, sequence, "optim_step", digest, b"body")

    async def append(self, store, sequence, digest="d"):
        return await store.ops.append(self.op(sequence, digest), job="", now=2.0)

    async def record(self, store, sequence, epoch, *, version=None, now=3.0):
        await store.ops.record(
            self.op(sequence),
            epoch=epoch,
            policy_version=version or sequence,
            result=b"result",
            result_key=None,
            now=now,
        )

    async def done(self, store, epoch, *, count, now=3.0):
        for sequence in range(1, count + 1):
            assert (await self.append(store, sequence)).adapter.name == A
            await self.record(store, sequence, epoch, now=now)

    def snapshot(self, next_sequence):
        return types.Snapshot("snapshots/" + "0" * 32, "ab", next_sequence, 1, 9, "cd")

    async def test_an_op_is_the_tail_until_its_result_is_recorded(self, store, epoch):
        assert (await self.append(store, 1)).adapter.next_sequence == 1
        tail = await store.ops.tail(A)
        assert (tail.sequence, tail.body, tail.done) == (1, b"body", False)
        assert await store.ops.tails() == {A}
        assert (await store.adapters.get(A)).adapter.next_sequence == 1
        await self.record(store, 1, epoch, version=7)
        assert await store.ops.tail(A) is None
        stored = await store.adapters.get(A)
        assert (stored.adapter.next_sequence, stored.adapter.policy_version) == (2, 7)
        assert stored.use_time == 3.0

    async def test_what_stands_in_the_journal_is_told_and_not_replaced(self, store, epoch):
        await self.append(store, 1)
        for sequence, digest in ((1, "d"), (1, "other"), (2, "d"), (9, "d")):
            found = await self.append(store, sequence, digest)
            assert (found.sequence, found.digest, found.done) == (1, "d", False)
        await self.record(store, 1, epoch)
        found = await self.append(store, 1)
        assert (found.done, found.result) == (True, b"result")
        with pytest.raises(AlreadyExists) as other:
            await self.append(store, 1, "other")
        assert other.value.context["expected_sequence"] == "2"

    @pytest.mark.usefixtures("epoch")
    async def test_a_sequence_that_does_not_follow_is_refused(self, store):
        with pytest.raises(SequenceGap) as gap:
            await self.append(store, 2)
        assert gap.value.context["expected_sequence"] == "1"
        with pytest.raises(InvalidRequest, match="sequence"):
            await self.append(store, 0)
        with pytest.raises(NotFound):
            await store.ops.append(JournaledOp(f"{A}x", 1, "optim_step", "d", b""), job="", now=2.0)

    async def test_a_refused_op_leaves_its_sequence_free_and_a_done_one_does_not(
        self, store, epoch
    ):
        await self.append(store, 1)
        await store.ops.refuse(self.op(1))
        assert (await self.append(store, 1, "other")).adapter.name == A
        await self.record(store, 1, epoch)
        await store.ops.refuse(self.op(1))
        assert (await store.ops.get(A, 1)).done

    async def test_what_a_former_owner_answers_is_not_recorded(self, store, epoch):
        await self.append(store, 1)
        stored = await store.adapters.give(await store.adapters.get(A), "trainer:2", now=1.0)
        assert stored.epoch > epoch
        with pytest.raises(Fenced):
            await self.record(store, 1, epoch)
        assert not await store.adapters.keep_snapshot(A, self.snapshot(1), epoch=epoch)
        assert (await store.ops.tail(A)).sequence == 1
        with pytest.raises(Fenced):  # who did not hear of it gives nothing away
            await store.adapters.give(dataclasses.replace(stored, epoch=epoch), "x", now=1.0)
        await self.record(store, 1, stored.epoch)

    async def test_an_epoch_is_never_used_twice_for_one_name(self, store, epoch):
        request = Request.of("p", "d", "DeleteAdapter", A)
        await store.adapters.delete(A, request, now=2.0)
        await store.adapters.reserve(A, "arith", LORA, job="", request=None, now=2.0)
        given = await store.adapters.give(await store.adapters.get(A), "trainer:1", now=2.0)
        assert given.epoch > epoch
        again = await store.adapters.give(given, "trainer:1", now=0.0)  # the clock was put back
        assert again.epoch > given.epoch

    async def test_a_snapshot_cuts_off_the_bodies_before_it(self, store, epoch):
        await self.done(store, epoch, count=3)
        assert await store.adapters.keep_snapshot(A, self.snapshot(3), epoch=epoch)
        assert (await store.adapters.get(A)).snapshot == self.snapshot(3)
        ops = [await store.ops.get(A, sequence) for sequence in (1, 2, 3)]
        assert [op.body for op in ops] == [None, None, b"body"]
        assert {op.result for op in ops} == {b"result"}

    async def test_a_snapshot_with_an_op_of_unknown_end_or_an_older_one_is_not_kept(
        self, store, epoch
    ):
        await self.done(store, epoch, count=3)
        await self.append(store, 4)
        assert not await store.adapters.keep_snapshot(A, self.snapshot(5), epoch=epoch)
        assert await store.adapters.keep_snapshot(A, self.snapshot(4), epoch=epoch)
        assert not await store.adapters.keep_snapshot(A, self.snapshot(3), epoch=epoch)
        assert (await store.ops.tail(A)).body == b"body"

    async def test_results_expire_but_not_the_newest_and_not_what_recovery_needs(
        self, store, epoch
    ):
        await self.done(store, epoch, count=4, now=3.0)
        await store.ops.expire(before=100.0)
        assert (await self.append(store, 1)).done  # its body is needed
        await store.adapters.keep_snapshot(A, self.snapshot(5), epoch=epoch)
        await store.ops.expire(before=3.0)
        assert (await self.append(store, 1)).done  # not old enough
        await store.ops.expire(before=100.0)
        with pytest.raises(FailedPrecondition, match="kept no longer"):
            await self.append(store, 1)
        assert (await self.append(store, 4)).result == b"result"

    async def test_a_deleted_adapter_takes_its_journal_along(self, store, epoch):
        await self.done(store, epoch, count=1)
        await store.adapters.delete(A, Request.of("p", "d", "DeleteAdapter", A), now=4.0)
        assert await store.ops.tails() == set()

    @pytest.mark.usefixtures("epoch")
    async def test_an_adapter_that_was_given_up_takes_no_op_and_tells_why(self, store):
        await store.adapters.give_up(A, "its snapshot is gone")
        with pytest.raises(FailedPrecondition, match="its snapshot is gone"):
            await self.append(store, 1)


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
    database = Database("postgresql://u@127.0.0.1:1/x")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        async with database.read():
            pass


class TestCheckpoints:
    NAME = f"{A}/checkpoints/c"
    SNAPSHOT = types.Snapshot("snapshots/" + "0" * 32, "ab" * 32, 3, 1, 99, "cd" * 32)

    @pytest.fixture
    async def adapter(self, store):
        request = Request.of("p", "a", "CreateAdapter", A)
        await store.adapters.reserve(A, "arith", LORA, job="", request=request, now=1.0)
        made = types.TrainerAdapter(A, LORA, 0, 1, has_pending_gradients=False)
        return (await store.adapters.confirm(A, job="", made=made)).adapter

    async def reserve(self, store, request_id="r", *, name=NAME, now=1.0):
        request = Request.of("p", request_id, "CreateCheckpoint", name)
        return await store.checkpoints.reserve(name, request=request, now=now)

    async def make(self, store, adapter, name=NAME, *, request_id="r", expire_time=None, now=1.0):
        await self.reserve(store, request_id, name=name, now=now)
        return await store.checkpoints.complete(
            name, adapter, self.SNAPSHOT, now=now, expire_time=expire_time
        )

    async def delete(self, store, request_id="d", *, now=1.0):
        request = Request.of("p", request_id, "DeleteCheckpoint", self.NAME)
        await store.checkpoints.delete(self.NAME, request, now=now)

    async def test_a_reservation_is_no_checkpoint_until_it_is_completed(self, store, adapter):
        assert await self.reserve(store) is None
        with pytest.raises(NotFound):
            await store.checkpoints.get(self.NAME, now=1.0)
        assert await store.checkpoints.page(A, limit=9, after="", now=1.0) == []
        with pytest.raises(NotFound):
            await self.delete(store)
        made = await self.make(store, adapter)
        assert made.snapshot == self.SNAPSHOT
        assert made.checkpoint == types.Checkpoint(
            self.NAME, "arith", LORA, 1, "cd" * 32, 99, create_time=1.0
        )
        assert await store.checkpoints.get(self.NAME, now=1.0) == made
        assert await self.reserve(store) == made

    @pytest.mark.parametrize("request_id", ["r", "another"])
    async def test_what_was_given_up_the_same_request_completes_and_another_takes_over(
        self, store, adapter, request_id
    ):
        await self.reserve(store)  # and its process died
        await self.make(store, adapter, request_id=request_id)
        if request_id == "another":
            with pytest.raises(AlreadyExists):
                await self.reserve(store)

    async def test_what_was_given_up_long_ago_is_forgotten_with_its_request(self, store, adapter):
        await self.reserve(store, now=1.0)
        assert await store.checkpoints.delete_expired(now=9.0, reserved_before=1.0) == []
        assert await store.checkpoints.delete_expired(now=9.0, reserved_before=1.1) == []
        with pytest.raises(NotFound):  # it comes too late
            await store.checkpoints.complete(
                self.NAME, adapter, self.SNAPSHOT, now=9.0, expire_time=None
            )
        made = await self.make(store, adapter, now=9.0)
        await store.checkpoints.delete_expired(now=99.0, reserved_before=99.0)
        assert await store.checkpoints.get(self.NAME, now=99.0) == made

    async def test_a_checkpoint_needs_an_adapter_that_exists(self, store):
        with pytest.raises(NotFound, match=A):
            await self.reserve(store)
        request = Request.of("p", "a", "CreateAdapter", A)
        await store.adapters.reserve(A, "arith", LORA, job="", request=request, now=1.0)
        with pytest.raises(NotFound, match=A):
            await self.reserve(store)

    async def test_an_expired_checkpoint_is_gone_at_once_and_its_name_is_free(self, store, adapter):
        await self.make(store, adapter, expire_time=10.0)
        assert (await store.checkpoints.get(self.NAME, now=9.9)).checkpoint.expire_time == 10.0
        with pytest.raises(AlreadyExists):
            await self.reserve(store, "other", now=9.9)
        with pytest.raises(NotFound):
            await store.checkpoints.get(self.NAME, now=10.0)
        with pytest.raises(NotFound):
            await self.reserve(store, now=10.0)  # a repeat: what it made is gone
        assert await store.checkpoints.page(A, limit=9, after="", now=10.0) == []
        await self.make(store, adapter, request_id="other", now=10.0)
        assert await store.checkpoints.delete_expired(now=99.0, reserved_before=0.0) == []

    async def test_a_repeated_delete_is_fine_and_another_finds_nothing(self, store, adapter):
        await self.make(store, adapter)
        await self.delete(store)
        await self.delete(store)
        with pytest.raises(NotFound):
            await self.delete(store, "other")
        await self.make(store, adapter, request_id="again")
        await self.delete(store)  # the first delete's repeat deletes nothing new
        assert (await store.checkpoints.get(self.NAME, now=1.0)).snapshot == self.SNAPSHOT

    async def test_checkpoints_outlive_their_adapter_and_are_listed_by_name(self, store, adapter):
        for name in ("b", "a-b", "a", "ab", "a0"):
            full = f"{A}/checkpoints/{name}"
            await self.make(store, adapter, full, request_id=f"c-{name}", expire_time=5.0)
        await store.adapters.delete(A, Request.of("p", "d", "DeleteAdapter", A), now=1.0)
        first = await store.checkpoints.page(A, limit=2, after="", now=1.0)
        rest = await store.checkpoints.page(A, limit=9, after="a-b", now=1.0)
        ids = [checkpoint.name.rpartition("/")[2] for checkpoint in [*first, *rest]]
        assert ids == ["a", "a-b", "a0", "ab", "b"]
        assert await store.checkpoints.page(f"{A}x", limit=9, after="", now=1.0) == []
        assert len(await store.checkpoints.delete_expired(now=5.0, reserved_before=0.0)) == 5
        assert await store.references.blob_keys() == set()

    async def test_what_rows_refer_to_is_known(self, store, adapter):
        await self.make(store, adapter)
        assert await store.references.blob_keys() == {self.SNAPSHOT.key}
        await self.delete(store)
        assert await store.references.blob_keys() == set()


class TestVersions:
    """Of one adapter, published at the time of its number."""

    @pytest.fixture
    async def adapter(self, store):
        return await self.make(store, A)

    async def make(self, store, name, *, num_versions=1):
        request = Request.of("p", f"c {name}", "CreateAdapter", name)
        await store.adapters.reserve(
            name, "arith", LORA, job="", request=request, now=0.0, num_versions=num_versions
        )
        made = types.TrainerAdapter(name, LORA, 0, 1, has_pending_gradients=False)
        await store.adapters.confirm(name, job="", made=made)
        return name

    async def publish(self, store, count, name=A, *, first=0):
        for number in range(first, first + count):
            version = types.PublishedVersion(number, f"d{number}", f"versions/{number:032x}")
            await store.versions.publish(name, version, now=float(number))

    async def let_go(self, store, superseded_before, now=1e6, *, max_superseded=999):
        gone = await store.versions.let_go(
            superseded_before=superseded_before, max_superseded=max_superseded, now=now
        )
        return [each.policy_version for each in gone]

    async def lease(
        self, store, version, name="l", *, adapter=A, until=1e6 + 10, now=1e6, **changes
    ):
        settings = {"expire_time": until, "max_leases": 9, "request": None, "now": now, **changes}
        return await store.leases.create(f"projects/p/leases/{name}", adapter, version, **settings)

    async def test_a_version_goes_some_time_after_it_was_superseded_and_the_newest_never(
        self, store, adapter
    ):
        await self.publish(store, 4)
        assert await self.let_go(store, 0.9) == []
        assert await self.let_go(store, 2.0) == [0, 1]
        assert await store.versions.since(adapter, 0) == {
            n: types.PublishedVersion(n, f"d{n}", f"versions/{n:032x}") for n in (2, 3)
        }
        assert await self.let_go(store, 1e9) == [2]
        assert (await store.versions.get(adapter, None)).policy_version == 3
        with pytest.raises(NotFound, match=r"no longer kept.*newest is 3.*CreateLease"):
            await store.versions.get(adapter, 1)

    async def test_as_many_are_kept_as_the_adapter_needs_however_far_apart_their_numbers(
        self, store
    ):
        await self.make(store, A, num_versions=3)
        for number in (0, 10, 20, 30, 40):
            await self.publish(store, 1, first=number)
        assert await self.let_go(store, 1e9) == [0, 10]
        assert await self.let_go(store, 1e9) == []

    async def test_a_version_that_was_published_again_is_where_it_was_written_last(
        self, store, adapter
    ):
        await self.publish(store, 2)
        moved = types.PublishedVersion(1, "d1", "versions/" + "f" * 32)
        await store.versions.move(adapter, moved)
        assert await store.versions.get(adapter, 1) == moved
        nowhere = types.PublishedVersion(1, "d1")
        await store.versions.publish(adapter, nowhere, now=9.0)
        assert await store.versions.get(adapter, 1) == moved
        await self.let_go(store, 1e9)
        await store.versions.move(adapter, types.PublishedVersion(0, "d0", "versions/x"))
        assert list(await store.versions.since(adapter, 0)) == [1]  # what is gone stays gone

    async def test_kept_versions_are_what_blobs_are_kept_for(self, store, adapter):
        await self.publish(store, 3)
        await self.lease(store, 0)
        await self.let_go(store, 1e9)
        assert await store.references.blob_keys() == {f"versions/{n:032x}" for n in (0, 2)}
        await store.adapters.delete(adapter, None, now=1e6)
        assert await store.references.blob_keys() == set()

    @pytest.mark.usefixtures("adapter")
    async def test_a_leased_version_stays_until_every_lease_on_it_has_ended(self, store):
        await self.publish(store, 5)
        made = await self.lease(store, 1, "l")
        assert made == types.Lease("projects/p/leases/l", A, 1, "d1", 1e6 + 10)
        await self.lease(store, 1, "m", until=1e6 + 20)
        assert await self.let_go(store, 1e9) == [0, 2, 3]
        await store.leases.delete("projects/p/leases/m", now=1e6)
        await store.leases.delete("projects/p/leases/m", now=1e6)  # gone is fine
        assert await self.let_go(store, 1e9, now=1e6 + 9.9) == []
        assert await self.let_go(store, 1e9, now=1e6 + 10) == [1]

    async def teach(self, store, *, version=None, job="j", **settings):
        distillation = {"teacher_adapter": A, "teacher_version": version}
        spec = spec_of(distillation=distillation, adapter={"id": job})
        return await create(store, job, spec=spec, **settings)

    async def test_a_jobs_teacher_is_held_from_its_creation_until_it_has_ended(
        self, store, adapter
    ):
        await self.publish(store, 2)
        for job in ("j", "k"):
            await self.teach(store, job=job)
        # The newest then, though neither has begun.
        known = {"base_model": "arith", "policy_version": 1, "digest": "d1"}
        assert (await store.jobs.load(J)).memory == {"teacher": known}
        await self.publish(store, 2, first=2)
        await store.jobs.command("projects/p/jobs/k", "cancel", now=1e9)
        await store.jobs.command(J, "start", now=1e9)
        await store.jobs.command(J, "pause", now=1e9)
        await store.jobs.command(J, "settle", now=1e9)
        assert await store.leases.expire(now=1e12) == 0
        assert await self.let_go(store, 1e12, now=1e12) == [0, 2]
        await store.jobs.command(J, "cancel", now=1e12)
        assert await self.let_go(store, 1e12, now=1e12) == [1]

    async def test_a_job_that_is_not_stored_holds_nothing(self, store, adapter):
        await self.publish(store, 2)
        with pytest.raises(Overloaded, match="max_pending_jobs"):
            await self.teach(store, version=0, max_pending=0)
        assert await self.let_go(store, 1e9) == [0]
        with pytest.raises(NotFound, match="version 0 of"):
            await self.teach(store, version=0)
        with pytest.raises(NotFound, match=J):
            await store.jobs.get(J)

    @pytest.mark.usefixtures("adapter")
    async def test_a_lease_without_a_version_is_on_the_newest(self, store):
        with pytest.raises(NotFound, match="yet"):
            await self.lease(store, None)
        await self.publish(store, 2)
        assert (await self.lease(store, None)).policy_version == 1
        await self.publish(store, 1, first=2)
        assert await self.let_go(store, 1e9) == [0]

    @pytest.mark.usefixtures("adapter")
    async def test_a_renewed_lease_lasts_and_one_that_has_ended_cannot_be_renewed(self, store):
        await self.publish(store, 1)
        made = await self.lease(store, 0, until=10.0, now=5.0)
        renewed = await store.leases.renew(made.name, expire_time=20.0, now=9.9)
        assert renewed == dataclasses.replace(made, expire_time=20.0)
        assert await store.leases.expire(now=19.9) == 0
        for ended in (lambda: store.leases.expire(now=20.0), lambda: asyncio.sleep(0)):
            with pytest.raises(NotFound, match=made.name):
                await store.leases.renew(made.name, expire_time=30.0, now=20.0)
            await ended()

    @pytest.mark.usefixtures("adapter")
    async def test_a_repeated_request_is_one_lease_whatever_was_published_since(self, store):
        await self.publish(store, 1)
        request = Request.of("p", "r", "CreateLease", A)
        made = await self.lease(store, None, request=request)
        await self.publish(store, 1, first=1)
        assert await self.lease(store, None, "other", request=request) == made
        with pytest.raises(AlreadyExists, match="request_id"):
            await self.lease(store, 1, "other", request=Request.of("p", "r", "CreateLease", "x"))
        await store.leases.delete(made.name, now=1e6)
        with pytest.raises(NotFound, match=made.name):
            await self.lease(store, None, "other", request=request)

    async def test_a_project_has_so_many_open_leases_and_no_more_however_they_come(self, store):
        names = [await self.make(store, f"{A}{n}") for n in range(9)]
        # At once, so that there are connections for the leases to come at once too.
        await asyncio.gather(*(self.publish(store, 1, name) for name in names))
        wanted = [
            self.lease(store, 0, f"l{n}", adapter=name, max_leases=3)
            for n, name in enumerate(names)
        ]
        made = await asyncio.gather(*wanted, return_exceptions=True)
        refused = [each for each in made if isinstance(each, Overloaded)]
        assert len(refused) == 6
        assert "max_leases" in str(refused[0])
        assert refused[0].context["allowed"] == "3"
        # What has expired does not count, whether or not it was forgotten yet.
        later = {"now": 1e6 + 10, "until": 1e6 + 20}
        await self.lease(store, 0, "later", adapter=names[0], max_leases=3, **later)

    @pytest.mark.usefixtures("adapter")
    async def test_leases_go_with_their_adapter_and_when_they_have_expired(self, store):
        await self.publish(store, 1)
        first, second = (
            await self.lease(store, 0, "l", until=1e6 + 1),
            await self.lease(store, 0, "m"),
        )
        assert await store.leases.expire(now=1e6 + 1) == 1
        with pytest.raises(NotFound):
            await store.leases.renew(first.name, expire_time=2e6, now=1e6)
        await store.adapters.delete(A, None, now=1e6)
        with pytest.raises(NotFound):
            await store.leases.renew(second.name, expire_time=2e6, now=1e6)
        assert await store.leases.expire(now=2e6) == 0

    @pytest.mark.usefixtures("adapter")
    async def test_a_lease_and_the_letting_go_of_its_version_cannot_both_win(self, store):
        async def lease(version):
            try:
                return (await self.lease(store, version, f"l{version}", max_leases=999)).name
            except NotFound:
                return None

        for first in range(0, 200, 20):
            await self.publish(store, 20, first=first)
            taken, gone = [], []
            async with asyncio.TaskGroup() as tasks:
                wanted = range(first, first + 19)
                taken = [tasks.create_task(lease(version)) for version in wanted[:10]]
                gone = [tasks.create_task(self.let_go(store, 1e9)) for _ in range(2)]
                taken += [tasks.create_task(lease(version)) for version in wanted[10:]]
            held = {v for v, task in zip(wanted, taken, strict=True) if task.result()}
            assert held.isdisjoint(version for task in gone for version in task.result())
            assert held <= set(await store.versions.since(A, first))

    @pytest.mark.usefixtures("adapter")
    async def test_a_renewal_and_the_letting_go_of_an_expired_leases_version_cannot_both_win(
        self, store
    ):
        await self.publish(store, 21)
        made = [await self.lease(store, n, f"l{n}", max_leases=99) for n in range(20)]

        async def renew(name):
            try:
                await store.leases.renew(name, expire_time=2e6, now=1e6 + 9.9)
            except NotFound:
                return False
            return True

        async with asyncio.TaskGroup() as tasks:
            renewed = [tasks.create_task(renew(lease.name)) for lease in made[:10]]
            gone = tasks.create_task(self.let_go(store, 1e9, now=1e6 + 10))
            renewed += [tasks.create_task(renew(lease.name)) for lease in made[10:]]
        kept = {v for v, task in enumerate(renewed) if task.result()}
        assert kept.isdisjoint(gone.result())
        assert kept | {20} == set(await store.versions.since(A, 0))

    async def test_more_than_one_transaction_takes_goes_in_several(
        self, store, adapter, monkeypatch
    ):
        monkeypatch.setattr(versions, "MAX_LET_GO", 3)
        monkeypatch.setattr(versions, "MAX_DELETED", 2)
        await self.publish(store, 6)
        assert await self.let_go(store, 1e9) == [0, 1, 2]
        assert await self.let_go(store, 1e9) == [3, 4]
        assert list(await store.versions.since(adapter, 0)) == [5]

    @pytest.mark.usefixtures("adapter")
    async def test_of_those_that_are_superseded_and_not_leased_so_many_stay_and_no_more(
        self, store
    ):
        await self.publish(store, 10)
        await self.lease(store, 1, "l")
        await self.lease(store, 7, "m")
        settings = {"superseded_before": 1.0, "max_superseded": 3, "now": 1e6}
        gone = await store.versions.let_go(**settings)
        # The first one is late: the sweeper gives its blob more time.
        assert gone == [
            LetGo("arith", A, n, f"versions/{n:032x}" if n else "") for n in (0, 2, 3, 4)
        ]
        assert await store.versions.let_go(**settings) == []
        assert list(await store.versions.since(A, 0)) == [1, 5, 6, 7, 8, 9]

    async def test_those_that_are_needed_stay_even_if_they_are_more(self, store):
        await self.make(store, A, num_versions=4)
        await self.publish(store, 6)
        assert await self.let_go(store, 0.0, max_superseded=1) == [0, 1]

    @pytest.mark.parametrize("seed", range(5))
    async def test_what_is_let_go_of_is_what_the_words_say(self, store, seed):
        choose = random.Random(seed)
        now, before, max_superseded = 1e6, 50.0, choose.randint(1, 8)
        expected = set()
        for index in range(4):
            name = await self.make(store, f"{A}{index}", num_versions=choose.randint(1, 6))
            num_versions = (await store.adapters.get(name)).num_versions
            numbers = sorted(choose.sample(range(100), choose.randint(0, 20)))
            for number in numbers:
                version = types.PublishedVersion(number, f"d{number}", "")
                await store.versions.publish(name, version, now=float(number))
            leased = set(choose.sample(numbers, len(numbers) // 4))
            for number in leased:
                await self.lease(store, number, f"l{index}-{number}", adapter=name, max_leases=999)
            # Oldest first, each superseded when the one behind it came.
            idle = [
                (number, behind) for number, behind in pairwise(numbers) if number not in leased
            ]
            expected |= {
                (name, number)
                for rank, (number, behind) in enumerate(reversed(idle), 1)
                if sum(other > number for other in numbers) >= num_versions
                and (behind <= before or rank > max_superseded)
            }
        gone = await store.versions.let_go(
            superseded_before=before, max_superseded=max_superseded, now=now
        )
        assert {(each.adapter, each.policy_version) for each in gone} == expected

"""Work that is done later, over gRPC: a whole coordinator on fakes, on either database."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.client import Client
from rollmesh.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    NonFinite,
    NotFound,
    Overloaded,
)
from services.coordinator.bodies import MAX_ROW_BYTES
from tests.fakes.coordinator import Fakes, eventually, running_coordinator
from tests.fakes.databases import emptied, postgresql_server
from tests.fakes.futures import (
    A,
    P,
    batch_work,
    create_work,
    fork_work,
    forward_work,
    keep_work,
    load_work,
    refused_work,
    sample_work,
    step_work,
)
from tests.fakes.mesh import digest_of


def future(name, project="p"):
    return f"projects/{project}/futures/{name}"


@pytest.fixture(scope="module")
def postgresql():
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request):
    """ "" for a file of the coordinator's own."""
    if request.param == "sqlite":
        return ""
    return await emptied(request.getfixturevalue("postgresql"), "futures")


@pytest.fixture
def fakes():
    return Fakes()


@pytest.fixture
def start(tmp_path, fakes, database):
    """Starts a coordinator, each time on what the one before has left."""

    def start(**settings):
        return running_coordinator(tmp_path, fakes, database=database, **settings)

    return start


@pytest.fixture
async def mesh(start):
    async with start() as running:
        await running.until_served()
        yield running


class Tenant:
    """Has work done in one queue, whose next position it knows."""

    def __init__(self, client: Client, queue="q"):
        self.client = client
        self.queue = queue

    async def create(self, position, work):
        name = future(f"{self.queue}-{position}")
        return await self.client.futures.create(name, work, queue=self.queue, position=position)

    async def done(self, position):
        return await done(self.client, future(f"{self.queue}-{position}"))

    async def do(self, *works, first=0):
        for position, work in enumerate(works, first):
            await self.create(position, work)
        return [await self.done(position) for position in range(first, first + len(works))]


async def done(client, name):
    """The future once it is done."""
    async with asyncio.timeout(30):
        while not (found := await client.futures.wait(name, 10.0)).done:
            pass
    return found


@pytest.fixture
async def tenant(mesh):
    return Tenant(mesh.client)


class TestWork:
    async def test_each_kind_of_work_answers_what_its_call_answers(self, mesh, tenant, fakes):
        kept = f"{A}/checkpoints/c"
        made, trained, looked, stepped, keeping, loaded, forked = await tenant.do(
            create_work(),
            batch_work(),
            forward_work(),
            step_work(),
            keep_work(checkpoint=kept),
            load_work(kept),
            fork_work(kept),
        )
        assert made.create_adapter.adapter.name == A
        assert trained.forward_backward.metrics["loss"] == 1.0
        assert len(convert.arrays_from_pb(looked.forward.logprobs)) == 1
        assert stepped.optim_step.policy_version == 1
        assert keeping.kept.policy.policy_version == 1
        assert keeping.kept.digest == keeping.kept.lease.digest == digest_of(A, 1)
        assert keeping.kept.checkpoint.name == kept
        assert loaded.load_checkpoint.policy_version == 2
        assert forked.fork_adapter.adapter.name == f"{P}/adapters/b"
        assert fakes.trainer.num_ops == 3
        assert (await mesh.client.adapters.get(A)).next_sequence == 4

    async def test_what_is_kept_amid_a_step_is_of_the_step_before_and_leaves_its_gradients(
        self, tenant
    ):
        _, _, keeping, stepped, after = await tenant.do(
            create_work(), batch_work(), keep_work(), step_work(), keep_work()
        )
        assert keeping.kept.policy.policy_version == 0
        assert keeping.kept.digest == digest_of(A, 0)
        assert stepped.optim_step.policy_version == after.kept.policy.policy_version == 1

    async def test_sampling_answers_whole_completions_by_index(self, mesh, tenant):
        await tenant.do(create_work(), keep_work())
        policy = types.PolicyRef(adapter=A, policy_version=0)
        await mesh.client.futures.create(future("s"), sample_work(count=3, policy=policy))
        found = await done(mesh.client, future("s"))
        chunks = [convert.chunk_from_pb(each) for each in found.sampled.completions]
        assert [chunk.index for chunk in chunks] == [0, 1, 2]
        assert {chunk.token_ids for chunk in chunks} == {(1, 2)}
        assert {chunk.stop_reason for chunk in chunks} == {"stop"}
        (span,) = chunks[0].spans
        assert (span.num_tokens, span.policy_version, span.digest) == (2, 0, digest_of(A, 0))

    async def test_work_without_a_queue_waits_for_nobody(self, mesh, tenant):
        await tenant.create(1, batch_work())
        await mesh.client.futures.create(future("alone"), create_work())
        assert (await done(mesh.client, future("alone"))).create_adapter.adapter.name == A

    async def test_a_failure_says_what_the_call_would_have_raised(self, tenant, fakes):
        fakes.trainer.refuses_ops = NonFinite("the loss is nan", field="loss")
        _, failed = await tenant.do(create_work(), batch_work())
        assert failed.failure.reason == "NON_FINITE"
        assert failed.failure.message == "the loss is nan"
        assert dict(failed.failure.metadata) == {"field": "loss"}

    async def test_refused_work_fails_as_it_says(self, tenant):
        (failed,) = await tenant.do(refused_work("bad loss"))
        assert failed.failure == refused_work("bad loss").refused


class TestOrder:
    async def test_what_comes_out_of_order_is_done_in_order(self, mesh, tenant, fakes):
        await tenant.do(create_work())
        for position in (2, 3, 1):
            await tenant.create(position, step_work(position))
        steps = [await tenant.done(position) for position in (1, 2, 3)]
        assert [step.optim_step.policy_version for step in steps] == [1, 2, 3]
        rates = [step.optim_step.metrics["learning_rate"] for step in steps]
        assert rates == [1.0, 2.0, 3.0]

    async def test_a_gap_waits_and_says_for_what(self, mesh, tenant, fakes):
        await tenant.do(create_work())
        await tenant.create(3, step_work())
        found = await mesh.client.futures.wait(future("q-3"), 0.0)
        assert not found.done
        assert found.waiting.rule == "ORDER"
        assert found.waiting.subject == future("q-3")
        assert found.waiting.position == 3
        assert "position 1 of queue 'q' has not come" in found.waiting.reason
        assert fakes.trainer.num_ops == 0

    @pytest.mark.parametrize(
        "broken", [refused_work(), step_work(rate=-1.0), batch_work(adapter="x")]
    )
    async def test_what_fails_lets_the_next_go_on(self, tenant, broken, fakes):
        fakes.trainer.refuses_ops = InvalidRequest("no", field="adam")
        _, failed = await tenant.do(create_work(), broken)
        assert failed.WhichOneof("result") == "failure"
        fakes.trainer.refuses_ops = None
        (stepped,) = await tenant.do(step_work(), first=2)
        assert stepped.optim_step.policy_version == 1

    async def test_the_next_begins_only_when_the_one_before_has_ended(self, mesh, tenant, fakes):
        await tenant.do(create_work())
        fakes.trainer.answering.clear()
        await tenant.create(1, step_work(1))
        await tenant.create(2, step_work(2))
        await fakes.trainer.ran.wait()
        found = await mesh.client.futures.wait(future("q-2"), 0.0)
        assert "position 1 of queue 'q' has not ended" in found.waiting.reason
        assert fakes.trainer.num_ops == 1
        fakes.trainer.answering.set()
        assert (await tenant.done(2)).optim_step.policy_version == 2

    async def test_queues_do_not_wait_for_each_other(self, mesh, fakes):
        one, other = Tenant(mesh.client, "one"), Tenant(mesh.client, "other")
        await one.create(1, step_work())
        (made,) = await other.do(create_work())
        assert made.create_adapter.adapter.name == A

    async def test_ops_of_one_adapter_from_many_queues_are_each_done_once(self, mesh, fakes):
        await mesh.client.futures.create(future("a"), create_work())
        await done(mesh.client, future("a"))
        names = [future(f"n-{number}") for number in range(8)]
        await asyncio.gather(*(mesh.client.futures.create(name, step_work()) for name in names))
        found = [await done(mesh.client, name) for name in names]
        versions = sorted(each.optim_step.policy_version for each in found)
        assert versions == list(range(1, 9))
        assert fakes.trainer.num_ops == 8

    async def test_ops_beside_futures_are_told_from_theirs(self, mesh, tenant, fakes):
        await tenant.do(create_work())
        fakes.trainer.answering.clear()
        adam = types.AdamConfig(learning_rate=5.0)
        beside = asyncio.create_task(mesh.client.training.optim_step(A, 1, adam))
        await fakes.trainer.ran.wait()
        await tenant.create(1, step_work())
        fakes.trainer.answering.set()
        assert (await beside).policy_version == 1
        assert (await tenant.done(1)).optim_step.policy_version == 2


class TestPatience:
    async def test_a_trainer_that_is_away_is_waited_for(self, mesh, tenant, fakes):
        await tenant.do(create_work())
        fakes.trainer.away = True
        await tenant.create(1, step_work())

        async def says_so():
            found = await mesh.client.futures.wait(future("q-1"), 0.0)
            return found.waiting.rule == "UNAVAILABLE"

        await eventually(says_so)
        fakes.trainer.away = False
        assert (await tenant.done(1)).optim_step.policy_version == 1
        assert fakes.trainer.num_ops == 1

    async def test_a_trainer_that_is_full_is_waited_for(self, mesh, tenant, fakes):
        await tenant.do(create_work())
        fakes.trainer.refuses_ops = Overloaded("full")
        await tenant.create(1, step_work())

        async def says_so():
            found = await mesh.client.futures.wait(future("q-1"), 0.0)
            return (found.waiting.rule, found.waiting.reason) == ("OVERLOADED", "full")

        await eventually(says_so)
        fakes.trainer.refuses_ops = None
        assert (await tenant.done(1)).optim_step.policy_version == 1

    async def test_futures_of_a_deleted_adapter_are_not_found(self, mesh, tenant):
        await tenant.do(create_work())
        await mesh.client.adapters.delete(A, request_id="d")
        found = await tenant.do(step_work(), keep_work(), forward_work(), first=1)
        assert {each.failure.reason for each in found} == {"NOT_FOUND"}


class TestRepeats:
    async def test_the_same_again_answers_the_same_future(self, tenant, fakes):
        _, first = await tenant.do(create_work(), step_work())
        assert await tenant.create(1, step_work()) == first
        assert fakes.trainer.num_ops == 1

    async def test_another_content_is_refused(self, mesh, tenant):
        await tenant.do(create_work(), step_work())
        with pytest.raises(AlreadyExists):
            await tenant.create(1, step_work(rate=2.0))
        with pytest.raises(AlreadyExists, match="position: 1"):
            await mesh.client.futures.create(future("z"), step_work(), queue="q", position=1)
        with pytest.raises(AlreadyExists):
            await mesh.client.futures.create(future("q-1"), step_work(), queue="q", position=2)
        with pytest.raises(AlreadyExists):
            await mesh.client.futures.create(future("q-1"), sample_work())

    async def test_samples_are_drawn_once(self, mesh, fakes):
        futures = mesh.client.futures
        await futures.create(future("s"), sample_work(), group="g")
        first = await done(mesh.client, future("s"))
        assert await futures.create(future("s"), sample_work(), group="g") == first
        for changed in (
            futures.create(future("s"), sample_work(prompt=(3,)), group="g"),
            futures.create(future("s"), sample_work()),
            futures.create(future("s"), step_work()),
        ):
            with pytest.raises(AlreadyExists):
                await changed


class TestRefusals:
    @pytest.mark.parametrize(
        ("field", "request_"),
        [
            ("name", {"name": "projects/p/adapters/a"}),
            ("queue", {"queue": "Q"}),
            ("queue", {"queue": "q", "work": sample_work()}),
            ("position", {"queue": "q", "position": -1}),
            ("position", {"position": 1}),
            ("group", {"group": "g"}),
            ("group", {"group": "-", "work": sample_work()}),
            ("work", {"work": pb.Work()}),
            (
                "work.optim_step.sequence",
                {"work": pb.Work(optim_step={"adapter": A, "sequence": 1})},
            ),
            (
                "work.create_adapter.request_id",
                {"work": pb.Work(create_adapter={"name": A, "request_id": "r"})},
            ),
        ],
    )
    async def test_what_is_wrong_with_the_request_is_said_at_once(self, mesh, field, request_):
        request = {"name": future("f"), "work": step_work(), **request_}
        with pytest.raises(InvalidRequest) as caught:
            await mesh.client.futures.create(request.pop("name"), request.pop("work"), **request)
        assert caught.value.context["field"] == field

    async def test_waiting_has_a_bound(self, mesh):
        with pytest.raises(InvalidRequest, match="timeout"):
            await mesh.client.futures.wait(future("f"), 61.0)
        with pytest.raises(InvalidRequest, match="timeout"):
            await mesh.client.futures.wait_many(P, "g", 0, 61.0)
        with pytest.raises(InvalidRequest, match="after"):
            await mesh.client.futures.wait_many(P, "g", -1, 0.0)

    async def test_what_is_not_there_is_not_found(self, mesh):
        with pytest.raises(NotFound):
            await mesh.client.futures.wait(future("none"), 0.0)
        with pytest.raises(NotFound):
            await mesh.client.futures.cancel(future("none"))

    async def test_a_project_has_no_more_unfinished_futures_than_it_may(self, start):
        async with start(max_futures=2) as mesh:
            one, other = Tenant(mesh.client), mesh.client.futures
            await one.create(1, step_work())
            await one.create(2, step_work())
            with pytest.raises(Overloaded) as caught:
                await one.create(3, step_work())
            assert caught.value.context["allowed"] == "2"
            await one.create(2, step_work())  # a repeat takes no more
            await other.create(future("x", "q"), refused_work())  # nor is it another project's
            assert (await done(mesh.client, future("x", "q"))).done


OTHERS = "projects/q/adapters/a"


class TestTenants:
    @pytest.mark.parametrize(
        "work",
        [
            create_work("projects/q/adapters/new"),
            batch_work(adapter=OTHERS),
            forward_work(OTHERS),
            step_work(adapter=OTHERS),
            load_work(f"{OTHERS}/checkpoints/c"),
            pb.Work(
                fork_adapter={"name": f"{P}/adapters/b", "checkpoint": f"{OTHERS}/checkpoints/c"}
            ),
            keep_work(adapter=OTHERS),
            keep_work(checkpoint=f"{OTHERS}/checkpoints/c", publish=False, lease_s=0),
            sample_work(project="projects/q"),
            sample_work(policy=types.PolicyRef(adapter=OTHERS)),
        ],
        ids=lambda work: work.WhichOneof("kind"),
    )
    async def test_what_is_another_projects_is_not_found(self, mesh, fakes, work):
        await mesh.client.futures.create(future("a", "q"), create_work(OTHERS))
        await done(mesh.client, future("a", "q"))
        await mesh.client.futures.create(future("f"), work)
        found = await done(mesh.client, future("f"))
        assert found.failure.reason == "NOT_FOUND"
        assert fakes.trainer.num_ops == 0
        assert not fakes.trainer.published
        assert [*fakes.trainer.adapters] == [OTHERS]

    async def test_queues_and_groups_of_the_same_name_are_not_the_same(self, mesh):
        await mesh.client.futures.create(future("f"), refused_work(), queue="q", position=1)
        mine = await mesh.client.futures.create(
            future("f", "q"), refused_work(), queue="q", position=0
        )
        assert (await done(mesh.client, mine.name)).done
        await mesh.client.futures.create(future("s"), sample_work(), group="g")
        await done(mesh.client, future("s"))
        assert await mesh.client.futures.wait_many("projects/q", "g", 0, 0.0) == ([], 0)


class TestSamples:
    async def test_a_group_tells_what_is_done_in_order_and_once(self, mesh, fakes):
        futures = mesh.client.futures
        fakes.sampler.sampling.clear()
        waiting = asyncio.create_task(futures.wait_many(P, "g", 0, 30.0))
        await futures.create(future("slow"), sample_work(), group="g")
        await futures.create(future("bad"), sample_work(prompt=()), group="g")
        found, cursor = await waiting
        assert found == [(future("bad"), True)]
        assert await futures.wait_many(P, "g", cursor, 0.0) == ([], cursor)
        waiting = asyncio.create_task(futures.wait_many(P, "g", cursor, 30.0))
        fakes.sampler.sampling.set()
        found, later = await waiting
        assert found == [(future("slow"), False)]
        assert later > cursor
        both, newest = await futures.wait_many(P, "g", 0, 0.0)
        assert [name for name, _ in both] == [future("bad"), future("slow")]
        assert newest == later

    async def test_a_cancelled_one_frees_its_slot_and_fails(self, mesh, fakes):
        fakes.sampler.sampling.clear()
        await mesh.client.futures.create(future("s"), sample_work())
        await fakes.sampler.until_running(1)
        waiting = asyncio.create_task(mesh.client.futures.wait(future("s"), 30.0))
        await mesh.client.futures.cancel(future("s"))
        assert (await waiting).failure.reason == "CANCELLED"
        await fakes.sampler.until_running(0)
        await mesh.client.futures.cancel(future("s"))  # it stays as it is
        assert (await mesh.client.futures.wait(future("s"), 0.0)).failure.reason == "CANCELLED"

    async def test_other_work_is_not_cancelled(self, tenant, mesh):
        await tenant.create(1, step_work())
        with pytest.raises(FailedPrecondition):
            await mesh.client.futures.cancel(future("q-1"))

    async def test_one_that_waits_in_the_scheduler_says_why(self, start, fakes):
        async with start(max_running_completions=1) as mesh:
            await mesh.until_served()
            fakes.sampler.sampling.clear()
            await mesh.client.futures.create(future("first"), sample_work())
            await fakes.sampler.until_running(1)
            await mesh.client.futures.create(future("second"), sample_work())

            async def says_so():
                found = await mesh.client.futures.wait(future("second"), 0.0)
                return found.waiting.rule == "NO_ROOM"

            await eventually(says_so)
            first = await mesh.client.futures.wait(future("first"), 0.0)
            assert not first.HasField("waiting")
            fakes.sampler.sampling.set()
            assert (await done(mesh.client, future("second"))).sampled.completions

    async def test_samplers_that_are_away_are_waited_for(self, start, fakes):
        fakes.sampler.away = True
        async with start() as mesh:
            await mesh.client.futures.create(future("s"), sample_work())

            async def says_so():
                found = await mesh.client.futures.wait(future("s"), 0.0)
                return found.waiting.rule == "UNAVAILABLE"

            await eventually(says_so)
            fakes.sampler.away = False
            assert (await done(mesh.client, future("s"))).sampled.completions

    async def test_they_are_lost_with_the_coordinator(self, start, fakes):
        async with start() as mesh:
            await mesh.until_served()
            await mesh.client.futures.create(future("s"), sample_work(), group="g")
            await done(mesh.client, future("s"))
            _, cursor = await mesh.client.futures.wait_many(P, "g", 0, 0.0)
        async with start() as mesh:
            await mesh.until_served()
            with pytest.raises(NotFound):
                await mesh.client.futures.wait(future("s"), 0.0)
            await mesh.client.futures.create(future("s"), sample_work(), group="g")
            await done(mesh.client, future("s"))
            # Whoever goes on with an old cursor misses nothing.
            found, _ = await mesh.client.futures.wait_many(P, "g", cursor, 0.0)
            assert found == [(future("s"), False)]

    async def test_a_project_has_no_more_unfinished_ones_than_it_may(self, start, fakes):
        async with start(max_futures=1) as mesh:
            await mesh.until_served()
            fakes.sampler.sampling.clear()
            await mesh.client.futures.create(future("one"), sample_work())
            with pytest.raises(Overloaded):
                await mesh.client.futures.create(future("two"), sample_work())
            await mesh.client.futures.cancel(future("one"))
            await mesh.client.futures.create(future("two"), sample_work())


class TestWaiting:
    async def test_who_waits_hears_when_it_is_done(self, mesh, tenant, fakes):
        await tenant.do(create_work())
        fakes.trainer.answering.clear()
        await tenant.create(1, step_work())
        waiting = asyncio.create_task(mesh.client.futures.wait(future("q-1"), 60.0))
        await fakes.trainer.ran.wait()
        fakes.trainer.answering.set()
        async with asyncio.timeout(20):
            assert (await waiting).done

    async def test_who_waits_for_too_long_hears_how_it_is(self, mesh, tenant):
        await tenant.create(1, step_work())
        assert not (await mesh.client.futures.wait(future("q-1"), 0.05)).done

    async def test_who_waits_when_the_coordinator_ends_is_answered(self, start):
        async with contextlib.AsyncExitStack() as stack:
            mesh = await stack.enter_async_context(start(drain_s=30.0))
            await Tenant(mesh.client).create(1, step_work())
            async with Client(f"127.0.0.1:{mesh.port}") as other:
                one = asyncio.create_task(other.futures.wait(future("q-1"), 60.0))
                many = asyncio.create_task(other.futures.wait_many(P, "g", 0, 60.0))
                await asyncio.sleep(0.2)  # both are there
                async with asyncio.timeout(20):
                    await stack.aclose()
                assert not (await one).done
                assert await many == ([], 0)


class TestLargeOnes:
    async def test_large_work_and_results_survive_in_the_blob_store(self, start, tmp_path):
        length = MAX_ROW_BYTES // 4
        async with start() as mesh:
            await mesh.until_served()
            tenant = Tenant(mesh.client)
            await tenant.create(1, batch_work(length=length))
            assert len(list((tmp_path / "blobs" / "futures").iterdir())) == 1
            await tenant.create(1, batch_work(length=length))  # a repeat writes nothing
            assert len(list((tmp_path / "blobs" / "futures").iterdir())) == 1
        async with start() as mesh:
            await mesh.until_served()
            tenant = Tenant(mesh.client)
            await tenant.create(0, create_work())
            (logprobs,) = (await tenant.done(1)).forward_backward.logprobs
            assert list(logprobs.shape) == [length]
            assert await mesh.store.references.blob_keys() & {
                f"futures/{path.name}" for path in (tmp_path / "blobs" / "futures").iterdir()
            }

    async def test_large_work_that_is_refused_writes_nothing(self, start, tmp_path):
        async with start(max_futures=1) as mesh:
            tenant = Tenant(mesh.client)
            await tenant.create(1, step_work())
            with pytest.raises(Overloaded):
                await tenant.create(2, batch_work(length=MAX_ROW_BYTES // 4))
            assert not list((tmp_path / "blobs").rglob("futures/*"))


class TestExpiry:
    async def test_a_result_is_not_found_once_it_was_kept_for_long_enough(self, start):
        async with start(result_retention_s=0.01) as mesh:
            await mesh.until_served()
            futures = mesh.client.futures
            await futures.create(future("f"), refused_work(), queue="q", position=0)
            await futures.create(future("s"), sample_work())

            async def are_gone():
                for name in ("f", "s"):
                    with contextlib.suppress(NotFound):
                        await futures.wait(future(name), 0.0)
                        return False
                return True

            await eventually(are_gone)
            # Long ago, but taken: the next position goes on from there.
            with pytest.raises(NotFound):
                await futures.create(future("f"), refused_work(), queue="q", position=0)
            await futures.create(future("g"), refused_work(), queue="q", position=1)

            async def goes_on():
                return await mesh.store.futures.next_position("p", "q") == 2

            await eventually(goes_on)


class TestSuccession:
    async def test_what_was_under_way_is_done_once_by_a_successor(self, start, fakes):
        async with start(drain_s=0.0) as mesh:
            await mesh.until_served()
            tenant = Tenant(mesh.client)
            await tenant.do(create_work())
            fakes.trainer.answering.clear()
            for position in (1, 2, 3):
                await tenant.create(position, step_work(position))
            await fakes.trainer.ran.wait()
        fakes.trainer.answering.set()
        async with start() as mesh:
            await mesh.until_served()
            tenant = Tenant(mesh.client)
            steps = [await tenant.done(position) for position in (1, 2, 3)]
        assert [step.optim_step.policy_version for step in steps] == [1, 2, 3]
        assert fakes.trainer.num_ops == 3

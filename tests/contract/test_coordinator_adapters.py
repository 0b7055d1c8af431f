"""Adapters, training, sampling and the fleet over gRPC, as an interactive client uses them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rollmesh import types
from rollmesh.api.coordinator.v1 import adapter_service_pb2 as pb
from rollmesh.api.coordinator.v1.adapter_service_pb2_grpc import AdapterServiceStub
from rollmesh.errors import (
    AlreadyExists,
    CapacityExhausted,
    DigestMismatch,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    SequenceGap,
    Unavailable,
)
from rollmesh.rpc.channel import channel
from tests.fakes.coordinator import PROJECT, Fakes, eventually, running_coordinator, spec_of
from tests.fakes.mesh import BASE_MODEL, FakeTrainer, digest_of

A = f"{PROJECT}/adapters/a"
LORA = types.LoraConfig(rank=4)
DATUM = types.Datum(np.array([1, 2], np.int32), np.array([2, 3], np.int32))
LOSS = types.LossConfig("cross_entropy")
ADAM = types.AdamConfig(learning_rate=0.1)


@pytest.fixture
def fakes():
    return Fakes()


@pytest.fixture
async def mesh(tmp_path, fakes):
    async with running_coordinator(tmp_path, fakes) as running:
        await running.until_served()
        yield running


@pytest.fixture
async def client(mesh):
    return mesh.client


class TestAdapters:
    async def test_a_new_adapter_is_fresh_and_as_its_trainer_made_it(self, client):
        adapter = await client.adapters.create(A, BASE_MODEL, LORA)
        assert (adapter.name, adapter.base_model, adapter.job) == (A, BASE_MODEL, "")
        assert adapter.lora == types.LoraConfig(rank=4, alpha=8.0)
        assert (adapter.policy_version, adapter.next_sequence) == (0, 1)
        assert adapter.published_version is None
        assert await client.adapters.get(A) == adapter
        assert [each async for each in client.adapters.list(PROJECT)] == [adapter]

    async def test_a_repeated_request_makes_no_second_one(self, client, fakes):
        first = await client.adapters.create(A, BASE_MODEL, LORA, "r")
        fakes.trainer.away = True
        assert await client.adapters.create(A, BASE_MODEL, LORA, "r") == first
        with pytest.raises(AlreadyExists, match="request_id"):
            await client.adapters.create(A, BASE_MODEL, types.LoraConfig(rank=8), "r")
        with pytest.raises(AlreadyExists, match=A):
            await client.adapters.create(A, BASE_MODEL, LORA, "another")

    async def test_a_time_to_live_is_set_anew_and_taken_away(self, client):
        await client.adapters.create(A, BASE_MODEL, LORA)
        for seconds in (60.0, None):
            await client.adapters.keep_idle(A, seconds)
            assert (await client.adapters.get(A)).idle_ttl_s == seconds
        with pytest.raises(InvalidRequest, match="idle_ttl: 0 s is not over 0"):
            await client.adapters.keep_idle(A, 0.0)
        with pytest.raises(NotFound, match=f"{A}2"):
            await client.adapters.keep_idle(f"{A}2", 60.0)

    async def test_the_same_request_many_times_at_once_makes_one_adapter(self, client, fakes):
        made = await asyncio.gather(
            *(client.adapters.create(A, BASE_MODEL, LORA, "r") for _ in range(8))
        )
        assert len(set(made)) == 1
        assert list(fakes.trainer.adapters) == [A]

    @pytest.mark.parametrize(
        ("name", "base_model", "rank", "field"),
        [
            pytest.param("projects/p/adapters/A", BASE_MODEL, 4, "name", id="bad name"),
            pytest.param(A, "nope", 4, "base_model", id="unknown base model"),
            pytest.param(A, BASE_MODEL, 0, "lora.rank", id="the trainer refuses it"),
        ],
    )
    async def test_what_cannot_be_made_is_refused_and_leaves_nothing(
        self, client, name, base_model, rank, field
    ):
        with pytest.raises(InvalidRequest) as refusal:
            await client.adapters.create(name, base_model, types.LoraConfig(rank=rank), "r")
        assert refusal.value.context["field"] == field
        assert [each async for each in client.adapters.list(PROJECT)] == []
        await client.adapters.create(A, BASE_MODEL, LORA, "r")  # the name and the id are free

    async def test_adapters_go_where_there_is_room_and_then_no_further(self, tmp_path):
        fakes = Fakes(
            trainers={"t:1": FakeTrainer(max_adapters=1), "t:2": FakeTrainer(max_adapters=2)}
        )
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.until_served()
            for number in range(3):
                await mesh.client.adapters.create(f"{A}{number}", BASE_MODEL, LORA)
            assert [len(trainer.adapters) for trainer in fakes.trainers.values()] == [1, 2]
            with pytest.raises(CapacityExhausted, match="every trainer of 'arith' is full"):
                await mesh.client.adapters.create(A, BASE_MODEL, LORA, "r")
            await mesh.client.adapters.delete(f"{A}0")
            await mesh.client.adapters.create(A, BASE_MODEL, LORA, "r")

    async def test_adapters_that_are_made_at_once_are_spread(self, tmp_path):
        fakes = Fakes(trainers={"t:1": FakeTrainer(), "t:2": FakeTrainer()})
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.until_served()
            names = [f"{A}{number}" for number in range(4)]
            create = mesh.client.adapters.create
            await asyncio.gather(*(create(name, BASE_MODEL, LORA) for name in names))
            assert [len(trainer.adapters) for trainer in fakes.trainers.values()] == [2, 2]

    async def test_a_trainer_that_does_not_take_an_adapter_is_passed_over(self, tmp_path):
        picky, full = FakeTrainer(max_adapters=9), FakeTrainer(max_adapters=1)
        picky.refuses = InvalidRequest("lora.rank: 4 is too large here", field="lora.rank")
        fakes = Fakes(trainers={"t:1": picky, "t:2": full})
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.until_served()
            await mesh.client.adapters.create(A, BASE_MODEL, LORA)
            assert (list(picky.adapters), list(full.adapters)) == ([], [A])
            with pytest.raises(CapacityExhausted):
                await mesh.client.adapters.create(f"{A}2", BASE_MODEL, LORA)
            full.refuses = picky.refuses
            with pytest.raises(InvalidRequest, match="too large here"):
                await mesh.client.adapters.create(f"{A}2", BASE_MODEL, LORA)

    async def test_a_job_goes_to_a_trainer_that_keeps_the_versions_it_samples(self, tmp_path):
        forgetful, keeper = FakeTrainer(max_adapters=9, kept_versions=2), FakeTrainer()
        fakes = Fakes(trainers={"t:1": forgetful, "t:2": keeper})
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.until_served()
            spec = spec_of(adapter={"id": "a"}, algorithm={"max_staleness": 1})
            await mesh.client.jobs.create(PROJECT, spec, "j")
            await mesh.until("j", "RUNNING")
            assert (list(forgetful.adapters), list(keeper.adapters)) == ([], [A])

    async def test_a_fresh_adapter_is_fresh_though_its_trainer_has_an_old_one_of_that_name(
        self, client, fakes
    ):
        # As when the coordinator's state was thrown away and the trainer went on.
        await fakes.trainer.create_adapter(A, LORA, epoch=7)
        await fakes.trainer.forward_backward(A, 1, [DATUM], LOSS, epoch=7)
        await fakes.trainer.optim_step(A, 2, ADAM, epoch=7)
        adapter = await client.adapters.create(A, BASE_MODEL, LORA)
        assert (adapter.policy_version, adapter.next_sequence) == (0, 1)

    async def test_a_creation_that_was_cut_off_can_be_repeated(self, tmp_path, fakes):
        fakes.trainer.creating.clear()
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.until_served()
            cut_off = asyncio.ensure_future(mesh.client.adapters.create(A, BASE_MODEL, LORA, "r"))
            await fakes.trainer.asked.wait()
            cut_off.cancel()
            with pytest.raises(NotFound):
                await mesh.client.adapters.get(A)
            fakes.trainer.creating.set()
            await mesh.client.adapters.create(A, BASE_MODEL, LORA, "r")
            assert (await mesh.client.adapters.get(A)).next_sequence == 1

    async def test_pages_are_in_the_order_of_the_names(self, mesh, fakes):
        fakes.trainer.max_adapters = 9
        for letter in "cab":
            await mesh.client.adapters.create(f"{PROJECT}/adapters/{letter}", BASE_MODEL, LORA)
        async with channel(f"127.0.0.1:{mesh.port}") as raw:
            stub = AdapterServiceStub(raw)
            first = await stub.ListAdapters(pb.ListAdaptersRequest(parent=PROJECT, page_size=2))
            assert [adapter.name[-1] for adapter in first.adapters] == ["a", "b"]
            second = await stub.ListAdapters(
                pb.ListAdaptersRequest(parent=PROJECT, page_token=first.next_page_token)
            )
            assert [adapter.name[-1] for adapter in second.adapters] == ["c"]
            assert second.next_page_token == ""

    async def test_a_deleted_adapter_is_gone_everywhere_and_its_name_free(self, client, fakes):
        await client.adapters.create(A, BASE_MODEL, LORA)
        await client.adapters.delete(A, "d")
        await client.adapters.delete(A, "d")  # a repeat
        assert fakes.trainer.adapters == {}
        assert fakes.sampler.unloaded == [(A, None)]
        with pytest.raises(NotFound):
            await client.adapters.get(A)
        with pytest.raises(NotFound):
            await client.adapters.delete(A)
        await client.adapters.create(A, BASE_MODEL, LORA)
        await client.adapters.delete(A, "d")  # still that repeat, of the deletion of the first
        assert (await client.adapters.get(A)).name == A


class TestTraining:
    async def test_ops_run_in_their_sequence_and_move_the_version(self, client):
        await client.adapters.create(A, BASE_MODEL, LORA)
        result = await client.training.forward_backward(A, 1, [DATUM], LOSS)
        assert result.metrics == {"loss": 1.0}
        assert [list(each) for each in result.logprobs] == [[-1.0, -1.0]]
        with pytest.raises(SequenceGap) as gap:
            await client.training.optim_step(A, 4, ADAM)
        assert gap.value.context["expected_sequence"] == "2"
        assert (await client.training.optim_step(A, 2, ADAM)).policy_version == 1
        (listed,) = [each async for each in client.adapters.list(PROJECT)]
        assert (listed.policy_version, listed.next_sequence) == (1, 3)
        plain = await client.training.forward(A, [DATUM, DATUM])
        assert (len(plain.logprobs), plain.metrics) == (2, {})
        (tempered,) = (await client.training.forward(A, [DATUM], temperature=0.5)).logprobs
        assert list(tempered) == [-2.0, -2.0]
        measured = await client.training.forward(A, [DATUM], loss_config=LOSS)
        assert (list(measured.logprobs[0]), measured.metrics) == ([-1.0, -1.0], {"loss": 1.0})

    async def test_a_published_version_is_exported_with_its_digest(self, client):
        await client.adapters.create(A, BASE_MODEL, LORA)
        with pytest.raises(NotFound, match="yet"):
            [part async for part in client.adapters.export(A)]
        published = await client.adapters.publish(A)
        assert published == types.PublishedVersion(0, digest_of(A, 0))
        assert await client.adapters.publish(A) == published
        header, *chunks, digest = [part async for part in client.adapters.export(A)]
        assert (header.adapter, header.policy_version, header.num_bytes) == (A, 0, 6)
        assert b"".join(chunks) == b"abcdef"
        assert digest == published.digest
        with pytest.raises(NotFound, match="newest is 0"):
            [part async for part in client.adapters.export(A, 7)]

    async def test_a_torn_export_is_unavailable_and_never_looks_whole(self, client, fakes):
        await client.adapters.create(A, BASE_MODEL, LORA)
        await client.adapters.publish(A)
        fakes.trainer.torn = True
        with pytest.raises(Unavailable, match="in the middle"):
            [part async for part in client.adapters.export(A)]

    async def test_a_version_never_changes(self, client, fakes):
        await client.adapters.create(A, BASE_MODEL, LORA)
        await client.adapters.publish(A)
        fakes.trainer.digests[A, 0] = "ff"
        with pytest.raises(DigestMismatch):
            await client.adapters.publish(A)
        with pytest.raises(DigestMismatch):
            [part async for part in client.adapters.export(A)]

    async def test_what_a_job_owns_it_alone_trains_until_it_has_ended(self, mesh, fakes):
        client = mesh.client
        await client.jobs.create(PROJECT, spec_of(adapter={"id": "a"}), "j")
        await mesh.until("j", "RUNNING")
        for refused in (
            client.training.forward_backward(A, 1, [DATUM], LOSS),
            client.training.optim_step(A, 1, ADAM),
            client.adapters.delete(A),
        ):
            with pytest.raises(FailedPrecondition, match="jobs/j, which has not ended"):
                await refused
        await client.training.forward(A, [DATUM])  # looking is free
        await client.jobs.cancel(f"{PROJECT}/jobs/j")
        await fakes.script.until_stopped("j")
        await client.training.forward_backward(A, 1, [DATUM], LOSS)
        await client.adapters.delete(A)

    async def test_an_ended_job_trains_no_more(self, tmp_path, fakes):
        trained = asyncio.Event()

        def play(peers):
            training = peers.training

            async def stubborn(context, _recorder):
                try:
                    await asyncio.Event().wait()
                finally:
                    try:
                        await training.optim_step(context.adapter, 1, ADAM, job=context.name)
                    except FailedPrecondition:
                        trained.set()

            return stubborn

        async with running_coordinator(tmp_path, fakes, play=play) as mesh:
            await mesh.client.jobs.create(PROJECT, spec_of(), "j")
            await mesh.until("j", "RUNNING")
            await mesh.client.jobs.cancel(f"{PROJECT}/jobs/j")
            async with asyncio.timeout(20):
                await trained.wait()

    async def test_a_trainer_that_is_away_is_unavailable_and_its_adapters_are_known(
        self, client, fakes
    ):
        adapter = await client.adapters.create(A, BASE_MODEL, LORA)
        fakes.trainer.away = True
        for call in (
            client.adapters.publish(A),
            client.training.forward(A, [DATUM]),
            client.training.forward_backward(A, 1, [DATUM], LOSS),
            client.adapters.get(A),  # an op may have run there, or not
        ):
            with pytest.raises(Unavailable):
                await call
        assert [each async for each in client.adapters.list(PROJECT)] == [adapter]
        fakes.trainer.away = False
        assert (await client.adapters.get(A)).next_sequence == 2

    async def test_an_adapter_can_be_deleted_while_its_trainer_is_away(self, client, fakes):
        await client.adapters.create(A, BASE_MODEL, LORA)
        fakes.trainer.away = True
        await client.adapters.delete(A)
        with pytest.raises(NotFound):
            await client.adapters.get(A)
        fakes.trainer.away = False

        async def freed() -> bool:
            return not fakes.trainer.adapters

        await eventually(freed)

    async def test_a_restarted_trainer_gets_its_adapters_back(self, client, fakes):
        await client.adapters.create(A, BASE_MODEL, LORA)
        await client.adapters.publish(A)
        await client.training.forward_backward(A, 1, [DATUM], LOSS)
        await client.training.optim_step(A, 2, ADAM)
        await client.adapters.publish(A)
        chain = fakes.trainer.chains[A]
        fakes.trainer.restart()

        async def restored() -> bool:
            return fakes.trainer.chains.get(A) == chain and 1 in fakes.trainer.published[A]

        await eventually(restored)
        assert await client.training.forward_backward(A, 3, [DATUM], LOSS)

    async def test_an_adapter_of_a_trainer_that_left_the_mesh_goes_to_another(
        self, tmp_path, fakes
    ):
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.until_served()
            await mesh.client.adapters.create(A, BASE_MODEL, LORA)
        fakes.trainers = {"t:2": FakeTrainer()}
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.until_served()
            await mesh.client.training.forward_backward(A, 1, [DATUM], LOSS)
            assert list(fakes.trainer.adapters) == [A]


class TestSampling:
    @pytest.fixture
    async def published(self, client):
        await client.adapters.create(A, BASE_MODEL, LORA)
        await client.adapters.publish(A)
        await client.training.forward_backward(A, 1, [DATUM], LOSS)
        await client.training.optim_step(A, 2, ADAM)
        await client.adapters.publish(A)

    @pytest.mark.usefixtures("published")
    @pytest.mark.parametrize(
        ("policy", "version", "digest"),
        [
            (types.PolicyRef(adapter=A), 1, digest_of(A, 1)),
            (types.PolicyRef(adapter=A, policy_version=0), 0, digest_of(A, 0)),
            (types.PolicyRef(base_model=BASE_MODEL, adapter=A), 1, digest_of(A, 1)),
            (types.PolicyRef(base_model=BASE_MODEL), types.BASE_VERSION, ""),
        ],
    )
    async def test_every_token_says_which_policy_it_is_of_and_who_drew_it(
        self, client, fakes, policy, version, digest
    ):
        sampler = fakes.sampler.instance_id
        completions = await client.sampling.sample(PROJECT, policy, [1, 2], 3)
        assert len(completions) == 3
        for completion in completions:
            assert completion.token_ids == (1, 2)
            assert completion.spans == (types.PolicySpan(2, version, digest, sampler),)
        logprobs = await client.sampling.compute_logprobs(PROJECT, policy, [1, 2, 3])
        assert logprobs.span == types.PolicySpan(3, version, digest, sampler)

    @pytest.mark.usefixtures("published")
    @pytest.mark.parametrize(
        ("project", "policy", "error", "says"),
        [
            pytest.param(
                PROJECT, types.PolicyRef(), InvalidRequest, "policy.base_model", id="no policy"
            ),
            pytest.param(
                PROJECT, types.PolicyRef(base_model="nope"), NotFound, "arith", id="base model"
            ),
            pytest.param(
                PROJECT,
                types.PolicyRef(base_model=BASE_MODEL, policy_version=0),
                InvalidRequest,
                "only an adapter",
                id="version of a base model",
            ),
            pytest.param(
                PROJECT,
                types.PolicyRef(base_model="big", adapter=A),
                InvalidRequest,
                "is on 'arith'",
                id="another base model",
            ),
            pytest.param(
                PROJECT,
                types.PolicyRef(adapter=A, policy_version=2),
                NotFound,
                "newest is 1",
                id="unpublished version",
            ),
            pytest.param(
                PROJECT, types.PolicyRef(adapter=f"{A}x"), NotFound, f"{A}x", id="no such adapter"
            ),
            pytest.param(
                "projects/other", types.PolicyRef(adapter=A), NotFound, A, id="another's adapter"
            ),
            pytest.param("other", types.PolicyRef(adapter=A), InvalidRequest, "project", id="name"),
        ],
    )
    async def test_a_policy_that_is_not_the_callers_to_sample_is_refused(
        self, client, project, policy, error, says
    ):
        for call in (
            client.sampling.sample(project, policy, [1]),
            client.sampling.compute_logprobs(project, policy, [1, 2]),
        ):
            with pytest.raises(error, match=says):
                await call

    @pytest.mark.parametrize("count", [-1, 1025])
    async def test_a_number_of_completions_out_of_range_is_refused(self, client, count):
        with pytest.raises(InvalidRequest, match="num_completions"):
            async for _ in client.sampling.stream(
                PROJECT, types.PolicyRef(base_model=BASE_MODEL), [1], count
            ):
                pass

    async def test_what_the_sampler_refuses_reaches_the_caller(self, client):
        with pytest.raises(InvalidRequest, match="prompt_token_ids"):
            await client.sampling.sample(PROJECT, types.PolicyRef(base_model=BASE_MODEL), [])

    @pytest.mark.usefixtures("published")
    async def test_a_caller_who_asks_for_it_is_moved_to_what_is_published_meanwhile(
        self, client, fakes
    ):
        fakes.sampler.sampling.clear()
        chunks = client.sampling.stream(
            PROJECT, types.PolicyRef(adapter=A), [1], continue_on_newest=True
        )
        assert [span.policy_version for span in (await anext(chunks)).spans] == [1]
        await client.training.forward_backward(A, 3, [DATUM], LOSS)
        await client.training.optim_step(A, 4, ADAM)
        await client.adapters.publish(A)

        async def moved() -> bool:
            return fakes.sampler.num_aborted == 1

        await eventually(moved)
        fakes.sampler.sampling.set()
        (rest,) = [chunk async for chunk in chunks]
        assert [span.policy_version for span in rest.spans] == [2]
        assert (rest.token_ids, rest.stop_reason) == ((2,), "stop")

    @pytest.mark.usefixtures("published")
    async def test_who_names_a_version_cannot_be_moved(self, client):
        policy = types.PolicyRef(adapter=A, policy_version=1)
        chunks = client.sampling.stream(PROJECT, policy, [1], continue_on_newest=True)
        with pytest.raises(InvalidRequest, match=r"policy\.policy_version"):
            await anext(chunks)

    async def test_a_caller_that_goes_away_ends_the_generation(self, client, fakes):
        fakes.sampler.sampling.clear()
        policy = types.PolicyRef(base_model=BASE_MODEL)
        async for _ in client.sampling.stream(PROJECT, policy, [1], 2):
            assert fakes.sampler.num_running == 1
            break
        await fakes.sampler.until_running(0)
        assert fakes.sampler.num_aborted == 1


async def test_the_fleet_says_who_serves_what(mesh, fakes):
    members = (await mesh.client.fleet.get()).members
    assert [(m.role, m.address, m.base_model, m.serving) for m in members] == [
        ("trainer", "t:1", BASE_MODEL, True),
        ("sampler", "s:1", BASE_MODEL, True),
        ("reward", "r:1", "", True),
        ("environment", "world", "", True),
    ]
    fakes.sampler.away = True

    async def told() -> bool:
        sampler = (await mesh.client.fleet.get()).members[1]
        return (sampler.serving, sampler.problem) == (False, "connection refused")

    await eventually(told)

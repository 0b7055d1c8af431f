"""Checkpoints over gRPC: made, read, gone back to, forked, exported, deleted, expired.

Most of it with adapters that answer at once, so that time and failures are the tests'; the last
class with a whole coordinator and its journal.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save

from rollmesh import types
from rollmesh.api.coordinator.v1 import checkpoint_service_pb2 as pb
from rollmesh.api.coordinator.v1.adapter_service_pb2_grpc import (
    add_AdapterServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.checkpoint_service_pb2_grpc import (
    CheckpointServiceStub,
    add_CheckpointServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.training_service_pb2_grpc import (
    add_TrainingServiceServicer_to_server,
)
from rollmesh.blobs import Blobs
from rollmesh.client import Client
from rollmesh.digest import safetensors_digest
from rollmesh.errors import (
    AlreadyExists,
    DigestMismatch,
    FailedPrecondition,
    InvalidRequest,
    MeshError,
    NotFound,
    Overloaded,
    SequenceGap,
    Unavailable,
)
from rollmesh.rpc.channel import channel
from rollmesh.rpc.server import serving
from rollmesh.rpc.status import mesh_errors
from rollmesh.snapshots import Manifest, Shape, StoredFile, write_snapshot
from services.coordinator.checkpoints import Checkpoints
from services.coordinator.servicers.adapters import AdapterServicer
from services.coordinator.servicers.checkpoints import CheckpointServicer
from services.coordinator.servicers.training import TrainingServicer
from services.coordinator.store import Origin, Request, open_store
from tests.fakes.coordinator import Fakes, eventually, running_coordinator
from tests.fakes.mesh import BASE_MODEL, digest_of

P = "projects/p"
A = f"{P}/adapters/a"
C = f"{A}/checkpoints/c"
LORA = types.LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"), seed=3)
CONFIG = json.dumps({"peft_type": "LORA", "r": 4})


class Adapters:
    """Adapters whose trainers answer at once: real rows and real snapshots, no weights to train."""

    def __init__(self, store, blobs, clock):
        self.store = store
        self.blobs = blobs
        self.clock = clock
        self.weights = np.arange(600_000, dtype=np.float32)
        self.next_sequence = 1
        self.trained = []
        self.num_snapshots = 0
        self.refusal: MeshError | None = None
        self.snapshotting = asyncio.Event()  # cleared: snapshots hang
        self.snapshotting.set()
        self.asked = asyncio.Event()  # set: a snapshot was asked for

    async def create_adapter(
        self,
        name,
        base_model,
        lora,
        *,
        job,
        request_id,
        num_versions=1,
        idle_ttl_s=None,
        fork_of=None,
        with_optimizer=False,
    ):
        lora = dataclasses.replace(lora, alpha=lora.alpha or 2.0 * lora.rank)
        origin = None if fork_of is None else Origin(fork_of, with_optimizer)
        content = (base_model, dataclasses.asdict(lora), idle_ttl_s)
        stored = await self.store.adapters.reserve(
            name,
            base_model,
            lora,
            job=job,
            request=Request.of(name.split("/")[1], request_id, "CreateAdapter", name, *content),
            now=self.clock(),
            num_versions=num_versions,
            idle_ttl_s=idle_ttl_s,
            origin=origin,
        )
        made = types.TrainerAdapter(name, lora, 0, 1, has_pending_gradients=False)
        await self.store.adapters.confirm(name, job=job, made=made)
        return stored.adapter

    async def snapshot(self, adapter):
        self.asked.set()
        await self.snapshotting.wait()
        if self.refusal is not None:
            raise self.refusal
        stored = await self.store.adapters.get(adapter)
        self.num_snapshots += 1
        file = save({"base_model.model.q_proj.lora_A.weight": self.weights})
        files = {"adapter": file, "state": b"moments"}
        manifest = Manifest(
            adapter=adapter,
            base_model=stored.adapter.base_model,
            lora=Shape(**dataclasses.asdict(stored.adapter.lora)),
            policy_version=self.next_sequence - 1,
            next_sequence=self.next_sequence,
            adam_step=0,
            has_pending_gradients=False,
            adapter_config_json=CONFIG,
            weights_digest=safetensors_digest(file),
            files={name: StoredFile.of(content) for name, content in files.items()},
        )
        key = f"snapshots/{self.num_snapshots:032x}"
        return stored, write_snapshot(self.blobs, key, manifest, files)

    async def train(self, adapter, sequence, op, *, job):
        self.trained.append((adapter, sequence, op, job))
        return types.LoadResult(sequence)


class World:
    """A store, blobs, the three services over them, and a client, at a time that the test says."""

    def __init__(self, store, folder):
        self.now = 1000.0
        self.store = store
        self.folder = folder
        self.blobs = Blobs(str(folder))
        self.adapters = Adapters(store, self.blobs, lambda: self.now)
        self.checkpoints = self.restarted()

    def restarted(self):
        """The core of a coordinator that starts on what there is."""
        return Checkpoints(
            self.store.checkpoints,
            self.adapters,
            self.store.adapters,
            self.blobs,
            clock=lambda: self.now,
        )

    async def adapter(self, name=A, base_model="arith", lora=LORA):
        return await self.adapters.create_adapter(
            name, base_model, lora, job="", request_id=f"make {name}"
        )


@pytest.fixture
async def world(tmp_path):
    async with open_store(f"sqlite:///{tmp_path}/store.sqlite", request_retention_s=1e9) as store:
        yield World(store, tmp_path / "blobs")


@pytest.fixture
async def address(world):
    def register(server):
        adapters, checkpoints = world.adapters, world.checkpoints
        add_AdapterServiceServicer_to_server(AdapterServicer(adapters, checkpoints), server)
        add_CheckpointServiceServicer_to_server(CheckpointServicer(checkpoints), server)
        add_TrainingServiceServicer_to_server(TrainingServicer(adapters, checkpoints), server)

    async with serving(register, services=[], address="127.0.0.1:0") as running:
        yield f"127.0.0.1:{running.port}"


@pytest.fixture
async def client(address):
    async with Client(address) as client:
        yield client


async def collect(parts):
    return [part async for part in parts]


class TestCreate:
    async def test_a_checkpoint_is_the_adapter_as_it_is_and_survives_it(self, world, client):
        await world.adapter()
        world.adapters.next_sequence = 8
        made = await client.checkpoints.create(C)
        digest = safetensors_digest(
            save({"base_model.model.q_proj.lora_A.weight": world.adapters.weights})
        )
        assert made == types.Checkpoint(
            C, "arith", LORA, 7, digest, made.num_bytes, create_time=1000.0
        )
        assert made.num_bytes > world.adapters.weights.nbytes
        await world.store.adapters.delete(A, Request.of("p", "d", "D", A), now=0.0)
        assert await client.checkpoints.get(C) == made
        assert await collect(client.checkpoints.list(A)) == [made]

    async def test_a_repeated_request_makes_no_second_one(self, world, client):
        await world.adapter()
        first = await client.checkpoints.create(C, "r", ttl_s=60)
        assert await client.checkpoints.create(C, "r", ttl_s=60) == first
        assert world.adapters.num_snapshots == 1
        with pytest.raises(AlreadyExists, match="request_id"):
            await client.checkpoints.create(C, "r", ttl_s=61)
        with pytest.raises(AlreadyExists, match=C):
            await client.checkpoints.create(C, "another", ttl_s=60)

    async def test_the_same_request_many_times_at_once_makes_one(self, world, client):
        await world.adapter()
        made = await asyncio.gather(*(client.checkpoints.create(C, "r") for _ in range(8)))
        assert (len(set(made)), world.adapters.num_snapshots) == (1, 1)

    async def test_of_many_requests_for_one_name_at_once_one_has_it(self, world, client):
        await world.adapter()
        made = await asyncio.gather(
            *(client.checkpoints.create(C) for _ in range(8)), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in made) == ["AlreadyExists"] * 7 + [
            "Checkpoint"
        ]
        assert world.adapters.num_snapshots == 1

    async def test_a_trainer_that_is_away_leaves_name_and_request_free(self, world, client):
        await world.adapter()
        world.adapters.refusal = Unavailable("the trainer is away")
        with pytest.raises(Unavailable):
            await client.checkpoints.create(C, "r")
        with pytest.raises(NotFound):
            await client.checkpoints.get(C)
        world.adapters.refusal = None
        await client.checkpoints.create(C, "another")
        await client.checkpoints.delete(C)
        await client.checkpoints.create(C, "r")

    @pytest.mark.parametrize("request_id", ["r", "another"])
    async def test_what_a_dead_coordinator_left_half_made_is_completed_or_taken_over(
        self, world, request_id
    ):
        await world.adapter()
        world.adapters.snapshotting.clear()
        dying = asyncio.create_task(
            world.checkpoints.create_checkpoint(C, ttl_s=None, request_id="r")
        )
        await world.adapters.asked.wait()
        dying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dying
        world.adapters.snapshotting.set()
        successor = world.restarted()
        with pytest.raises(NotFound):
            await successor.get_checkpoint(C)
        made = await successor.create_checkpoint(C, ttl_s=None, request_id=request_id)
        assert await successor.get_checkpoint(C) == made

    @pytest.mark.parametrize("ttl_s", [0, -1, 1e12, -9e15])
    async def test_a_time_to_live_out_of_range_is_refused(self, world, client, ttl_s):
        await world.adapter()
        with pytest.raises(InvalidRequest) as refusal:
            await client.checkpoints.create(C, ttl_s=ttl_s)
        assert refusal.value.context["field"] == "ttl"
        assert float(refusal.value.context["value"]) == ttl_s

    @pytest.mark.parametrize(
        "name",
        [
            "c",
            A,
            f"{A}/checkpoints/C",
            f"{A}/checkpoints/..",
            f"{A}/../b/checkpoints/c",
            f"/{C}",
            f"{A}/checkpoints/é",
            f"{A}/checkpoints/c/d",
            "",
        ],
    )
    async def test_a_bad_name_is_refused_everywhere_by_its_field(self, world, client, name):
        await world.adapter()
        for call, field in (
            (client.checkpoints.create(name), "name"),
            (client.checkpoints.get(name), "name"),
            (client.checkpoints.delete(name), "name"),
            (collect(client.checkpoints.export(name)), "name"),
            (client.adapters.fork(f"{P}/adapters/b", name), "checkpoint"),
            (client.training.load_checkpoint(A, 1, name, with_optimizer=False), "checkpoint"),
        ):
            with pytest.raises(InvalidRequest) as refusal:
                await call
            assert (refusal.value.context["field"], refusal.value.context["value"]) == (field, name)

    async def test_what_is_not_there_is_not_found(self, world, client):
        for call in (
            client.checkpoints.create(C),
            client.checkpoints.get(C),
            client.checkpoints.delete(C),
            collect(client.checkpoints.export(C)),
            client.adapters.fork(f"{P}/adapters/b", C),
        ):
            with pytest.raises(NotFound):
                await call
        await world.adapter()
        with pytest.raises(NotFound, match=C):
            await client.training.load_checkpoint(A, 1, C, with_optimizer=False)


class TestListAndDelete:
    async def test_checkpoints_of_one_adapter_are_listed_by_name_in_pages(self, world, client):
        await world.adapter()
        await world.adapter(f"{A}2")
        names = [f"{A}/checkpoints/c{number}" for number in range(5)]
        for name in (*reversed(names), f"{A}2/checkpoints/x"):
            await client.checkpoints.create(name)
        assert [each.name async for each in client.checkpoints.list(A)] == names

    async def test_a_page_is_as_long_as_asked_for_and_says_where_the_next_begins(
        self, world, address, client
    ):
        await world.adapter()
        for number in range(3):
            await client.checkpoints.create(f"{A}/checkpoints/c{number}")
        async with channel(address) as connection:
            stub = CheckpointServiceStub(connection)
            first = await stub.ListCheckpoints(pb.ListCheckpointsRequest(parent=A, page_size=2))
            token = first.next_page_token
            second = await stub.ListCheckpoints(
                pb.ListCheckpointsRequest(parent=A, page_size=2, page_token=token)
            )
            assert [len(first.checkpoints), len(second.checkpoints)] == [2, 1]
            assert second.next_page_token == ""
            for request, field in (
                (pb.ListCheckpointsRequest(parent=P), "parent"),
                (pb.ListCheckpointsRequest(parent=A, page_size=1001), "page_size"),
                (pb.ListCheckpointsRequest(parent=A, page_size=-1), "page_size"),
                (pb.ListCheckpointsRequest(parent=A, page_token="../x\0"), "page_token"),  # noqa: S106
            ):
                with pytest.raises(InvalidRequest) as refusal, mesh_errors():
                    await stub.ListCheckpoints(request)
                assert refusal.value.context["field"] == field

    async def test_a_deleted_checkpoint_is_gone_and_its_name_is_free(self, world, client):
        await world.adapter()
        await client.checkpoints.create(C)
        await client.checkpoints.delete(C, "d")
        await client.checkpoints.delete(C, "d")
        for call in (client.checkpoints.get(C), client.checkpoints.delete(C, "other")):
            with pytest.raises(NotFound):
                await call
        await client.checkpoints.create(C)
        await client.checkpoints.delete(C, "d")
        await client.checkpoints.get(C)

    async def test_an_expired_checkpoint_is_not_found_at_once(self, world, client):
        await world.adapter()
        made = await client.checkpoints.create(C, ttl_s=60)
        assert made.expire_time == 1060.0
        world.now = 1059.9
        assert await client.checkpoints.get(C) == made
        world.now = 1060.0
        assert await collect(client.checkpoints.list(A)) == []
        for call in (
            client.checkpoints.get(C),
            client.checkpoints.delete(C),
            collect(client.checkpoints.export(C)),
            client.adapters.fork(f"{P}/adapters/b", C),
            client.training.load_checkpoint(A, 1, C, with_optimizer=False),
        ):
            with pytest.raises(NotFound):
                await call
        await client.checkpoints.create(C)


class TestFork:
    async def test_a_fork_has_the_checkpoints_shape_and_begins_with_its_snapshot(
        self, world, client
    ):
        await world.adapter()
        await client.checkpoints.create(C)
        (snapshot,) = await world.store.references.blob_keys()
        fork = await client.adapters.fork(
            f"{P}/adapters/b", C, with_optimizer=True, idle_ttl_s=3600.0
        )
        assert (fork.name, fork.base_model, fork.lora) == (f"{P}/adapters/b", "arith", LORA)
        assert (fork.policy_version, fork.next_sequence, fork.idle_ttl_s) == (0, 1, 3600.0)
        origin = (await world.store.adapters.get(fork.name)).origin
        assert (origin.snapshot.key, origin.with_optimizer) == (snapshot, True)

    async def test_the_checkpoint_of_a_deleted_adapter_can_be_forked_under_its_name(
        self, world, client
    ):
        await world.adapter()
        await client.checkpoints.create(C)
        await world.store.adapters.delete(A, Request.of("p", "d", "D", A), now=0.0)
        fork = await client.adapters.fork(A, C)
        assert fork.name == A
        assert not (await world.store.adapters.get(A)).origin.with_optimizer

    @pytest.mark.parametrize("exists", [True, False])
    async def test_another_projects_checkpoint_is_not_there_whether_it_is_or_not(
        self, world, client, exists
    ):
        if exists:
            await world.adapter()
            await client.checkpoints.create(C)
        with pytest.raises(NotFound) as refusal:
            await client.adapters.fork("projects/q/adapters/b", C)
        assert str(refusal.value) == f"there is no {C}"

    async def test_a_repeated_request_makes_no_second_one(self, world, client):
        await world.adapter()
        await client.checkpoints.create(C)
        first = await client.adapters.fork(f"{P}/adapters/b", C, "r")
        assert await client.adapters.fork(f"{P}/adapters/b", C, "r") == first


class TestLoad:
    async def test_a_load_is_an_op_of_the_adapter_with_the_checkpoints_snapshot(
        self, world, client
    ):
        await world.adapter()
        await world.adapter(f"{A}2")
        await client.checkpoints.create(C)
        stored = await world.store.checkpoints.get(C, now=world.now)
        result = await client.training.load_checkpoint(f"{A}2", 5, C, with_optimizer=True)
        assert result == types.LoadResult(5)
        op = types.LoadSnapshot(stored.snapshot, with_optimizer=True)
        ((adapter, sequence, trained, job),) = world.adapters.trained
        assert (adapter, sequence, job) == (f"{A}2", 5, "")
        assert dataclasses.astuple(trained) == dataclasses.astuple(op)

    @pytest.mark.parametrize("exists", [True, False])
    async def test_another_projects_checkpoint_is_refused_whether_it_is_there_or_not(
        self, world, client, exists
    ):
        await world.adapter("projects/q/adapters/b")
        if exists:
            await world.adapter()
            await client.checkpoints.create(C)
        with pytest.raises(InvalidRequest, match="of another project") as refusal:
            await client.training.load_checkpoint(
                "projects/q/adapters/b", 1, C, with_optimizer=False
            )
        assert refusal.value.context["field"] == "checkpoint"
        assert world.adapters.trained == []

    @pytest.mark.parametrize(
        ("base_model", "changes", "told"),
        [
            ("big", {}, "base_model 'arith', not 'big'"),
            ("arith", {"rank": 8}, "lora.rank 4, not 8"),
            ("arith", {"alpha": 16.0}, "lora.alpha 8.0, not 16.0"),
            (
                "arith",
                {"target_modules": ("q_proj",)},
                r"lora.target_modules \['q_proj', 'v_proj'\], not \['q_proj'\]",
            ),
            ("big", {"rank": 8}, "base_model 'arith', not 'big'; lora.rank 4, not 8"),
        ],
    )
    async def test_a_checkpoint_of_another_shape_is_refused_with_all_that_differs(
        self, world, client, base_model, changes, told
    ):
        await world.adapter()
        await client.checkpoints.create(C)
        await world.adapter(f"{A}2", base_model, dataclasses.replace(LORA, **changes))
        with pytest.raises(FailedPrecondition, match=told):
            await client.training.load_checkpoint(f"{A}2", 1, C, with_optimizer=False)
        assert world.adapters.trained == []

    async def test_another_seed_or_order_of_modules_is_no_other_shape(self, world, client):
        await world.adapter()
        await client.checkpoints.create(C)
        lora = dataclasses.replace(LORA, seed=9, target_modules=("v_proj", "q_proj"))
        await world.adapter(f"{A}2", lora=lora)
        await client.training.load_checkpoint(f"{A}2", 1, C, with_optimizer=False)
        assert len(world.adapters.trained) == 1


class TestExport:
    async def test_an_export_is_the_peft_folder_of_the_weights(self, world, client):
        await world.adapter()
        world.adapters.next_sequence = 3
        made = await client.checkpoints.create(C)
        header, *chunks, digest = await collect(client.checkpoints.export(C))
        file = save({"base_model.model.q_proj.lora_A.weight": world.adapters.weights})
        assert header == types.AdapterExport(A, 2, "arith", CONFIG, len(file))
        assert b"".join(chunks) == file
        assert len(chunks) == 3
        assert max(map(len, chunks)) <= 1 << 20
        assert digest == made.digest == safetensors_digest(file)

    @pytest.mark.parametrize("name", ["adapter", "manifest"])
    async def test_a_bit_that_flipped_in_the_store_is_never_exported(self, world, client, name):
        await world.adapter()
        await client.checkpoints.create(C)
        (path,) = world.folder.rglob(name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        received = []

        async def receive():
            async for part in client.checkpoints.export(C):
                received.append(part)  # noqa: PERF401 - what came before the error counts

        with pytest.raises(DigestMismatch):
            await receive()
        assert not any(isinstance(part, bytes | str) for part in received)

    async def test_exports_at_once_are_bounded_and_those_that_end_make_room(self, world):
        await world.adapter()
        await world.checkpoints.create_checkpoint(C, ttl_s=None, request_id="r")
        readers = [world.checkpoints.export_checkpoint(C) for _ in range(8)]
        for reader in readers:
            await anext(reader)
        with pytest.raises(Overloaded, match="8 checkpoints are being exported"):
            await collect(world.checkpoints.export_checkpoint(C))
        await readers[0].aclose()
        await collect(world.checkpoints.export_checkpoint(C))
        for reader in readers:
            await reader.aclose()


class TestWholeCoordinator:
    """The fake trainer's state is a chain of hashes over its ops: `trainer.chains`."""

    DATUM = types.Datum(np.array([1, 2], np.int32), np.array([2, 3], np.int32))

    @pytest.fixture
    def fakes(self):
        return Fakes()

    @pytest.fixture
    async def whole(self, tmp_path, fakes):
        async with running_coordinator(tmp_path, fakes) as running:
            await running.until_served()
            yield running.client

    async def train(self, client, name, first):
        loss, adam = types.LossConfig("cross_entropy"), types.AdamConfig(learning_rate=0.1)
        await client.training.forward_backward(name, first, [self.DATUM], loss)
        await client.training.optim_step(name, first + 1, adam)

    async def test_a_checkpoint_is_of_the_ops_that_were_answered_and_no_later_ones(
        self, whole, fakes
    ):
        await whole.adapters.create(A, BASE_MODEL, types.LoraConfig(rank=4))
        await self.train(whole, A, 1)
        kept = fakes.trainer.chains[A]
        made = await whole.checkpoints.create(C)
        await self.train(whole, A, 3)
        assert (made.policy_version, made.digest) == (1, digest_of(A, 1))
        assert kept in [chain for _, chain in fakes.trainer.snapshots.values()]
        assert made.lora == types.LoraConfig(rank=4, alpha=8.0)
        assert await whole.checkpoints.get(C) == made

    async def test_a_load_takes_its_turn_among_the_ops_and_is_done_once(self, whole, fakes):
        await whole.adapters.create(A, BASE_MODEL, types.LoraConfig(rank=4))
        await self.train(whole, A, 1)
        await whole.checkpoints.create(C)
        with pytest.raises(SequenceGap) as gap:
            await whole.training.load_checkpoint(A, 4, C, with_optimizer=True)
        assert gap.value.context["expected_sequence"] == "3"
        loaded = await whole.training.load_checkpoint(A, 3, C, with_optimizer=True)
        assert loaded == types.LoadResult(2)
        after = fakes.trainer.chains[A]
        assert await whole.training.load_checkpoint(A, 3, C, with_optimizer=True) == loaded
        assert fakes.trainer.chains[A] == after
        with pytest.raises(AlreadyExists):
            await whole.training.load_checkpoint(A, 3, C, with_optimizer=False)
        assert (await whole.adapters.get(A)).next_sequence == 4

    @pytest.mark.parametrize("with_optimizer", [True, False])
    async def test_a_fork_of_a_deleted_adapters_checkpoint_goes_on_by_itself(
        self, whole, fakes, with_optimizer
    ):
        b = f"{P}/adapters/b"
        await whole.adapters.create(A, BASE_MODEL, types.LoraConfig(rank=4))
        await self.train(whole, A, 1)
        await whole.checkpoints.create(C)
        await whole.adapters.delete(A)
        fork = await whole.adapters.fork(b, C, "r", with_optimizer=with_optimizer)
        assert fork.lora == types.LoraConfig(rank=4, alpha=8.0)
        assert (fork.policy_version, fork.next_sequence) == (0, 1)
        begun = fakes.trainer.chains[b]
        fakes.trainer.restart()
        await self.train(whole, b, 1)  # which recovers it from the checkpoint's snapshot
        trained = fakes.trainer.chains[b]
        await whole.adapters.delete(b)
        await whole.adapters.fork(b, C, with_optimizer=with_optimizer)
        assert fakes.trainer.chains[b] == begun
        await self.train(whole, b, 1)
        assert fakes.trainer.chains[b] == trained

    @pytest.mark.parametrize("ttl_s", [0, -1, 1e12])
    async def test_an_idle_time_out_of_range_is_refused(self, whole, ttl_s):
        await whole.adapters.create(A, BASE_MODEL, types.LoraConfig(rank=4), idle_ttl_s=60)
        await whole.checkpoints.create(C)
        b = f"{P}/adapters/b"
        for call in (
            whole.adapters.create(b, BASE_MODEL, types.LoraConfig(rank=4), idle_ttl_s=ttl_s),
            whole.adapters.fork(b, C, idle_ttl_s=ttl_s),
        ):
            with pytest.raises(InvalidRequest) as refusal:
                await call
            assert refusal.value.context["field"] == "idle_ttl"
        assert [(each.name, each.idle_ttl_s) async for each in whole.adapters.list(P)] == [(A, 60)]

    async def test_a_trainer_that_cannot_write_leaves_the_name_free(self, whole, fakes):
        await whole.adapters.create(A, BASE_MODEL, types.LoraConfig(rank=4))
        fakes.trainer.refuses_snapshots = FailedPrecondition("no")
        with pytest.raises(FailedPrecondition):
            await whole.checkpoints.create(C, "r")
        assert await collect(whole.checkpoints.list(A)) == []
        fakes.trainer.refuses_snapshots = None
        await whole.checkpoints.create(C, "another")

    async def test_a_coordinator_sweeps_as_soon_as_it_starts(self, tmp_path, fakes):
        names = [f"{P}/adapters/{name}" for name in ("idle", "kept", "used")]
        async with running_coordinator(tmp_path, fakes) as mesh:
            await mesh.until_served()
            for name, ttl_s in zip(names, (60, None, 60), strict=True):
                await mesh.client.adapters.create(
                    name, BASE_MODEL, types.LoraConfig(rank=4), idle_ttl_s=ttl_s
                )
                await mesh.client.checkpoints.create(f"{name}/checkpoints/c")
            for name in names[:2]:
                await mesh.store.adapters.touch(name, now=0.0)
        async with running_coordinator(tmp_path, fakes) as mesh:

            async def swept() -> bool:
                return [each.name async for each in mesh.client.adapters.list(P)] == names[1:]

            await eventually(swept)
            assert await mesh.client.checkpoints.get(f"{names[0]}/checkpoints/c")
            await mesh.until_served()
            await eventually(lambda: no_longer_held(fakes, names[0]))


async def no_longer_held(fakes, name):
    return name not in fakes.trainer.adapters

"""From a real trainer to a sampler's disk: over gRPC, and through the blob store."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from rollmesh.api.trainer.v1.trainer_service_pb2_grpc import add_TrainerServiceServicer_to_server
from rollmesh.blobs import Blobs
from rollmesh.client import TrainerClient
from rollmesh.digest import safetensors_digest
from rollmesh.errors import NotFound, SourceUnavailable, Unavailable
from rollmesh.rpc.channel import EXPORT_CHUNK_BYTES, channel
from rollmesh.rpc.server import serving
from rollmesh.types import AdapterSource, LoraConfig
from services.sampler.adapters import Adapters
from services.sampler.transfer import Sources
from services.trainer.servicer import TrainerServicer
from tests.fakes.tiny_qwen3 import tiny_adapters, tiny_qwen3

A = "projects/p/adapters/a"


class Trainer:
    """One on a port of its own, with a published version of more than one chunk.

    Attributes:
        source: of the version.
        num_bytes: of its file, sent so far; a call breaks off once after `break_after` chunks.
    """

    def __init__(self, source: AdapterSource) -> None:
        self.source = source
        self.num_bytes = 0
        self.break_after: int | None = None

    async def parts(self, source, offset):
        async with channel(source.trainer_address) as opened:
            parts = TrainerClient(opened).export_adapter(
                source.adapter, source.policy_version, offset=offset
            )
            async with contextlib.aclosing(parts):
                async for part in parts:
                    yield part
                    if isinstance(part, bytes):
                        self.num_bytes += len(part)
                        if self.num_bytes == self.break_after:
                            raise Unavailable("the connection is cut")


@contextlib.asynccontextmanager
async def trainer(blobs: str, *, seed: int = 0):
    async with (
        tiny_adapters(blobs=blobs, max_rank=1024) as held,
        serving(
            lambda server: add_TrainerServiceServicer_to_server(TrainerServicer(held), server),
            services=[],
        ) as running,
    ):
        await held.create(A, LoraConfig(1024, seed=seed), epoch=1)
        version = await held.get(A).publish(1)
        yield Trainer(
            AdapterSource(
                A,
                version.policy_version,
                version.digest,
                f"127.0.0.1:{running.port}",
                version.export_key,
            )
        )


async def forget(_) -> None:
    """No engine has anything loaded."""


def adapters(sources: Sources, folder) -> Adapters:
    folder.mkdir(exist_ok=True)
    return Adapters(
        sources.pull,
        folder,
        release=forget,
        base_model="tiny",
        max_rank=1024,
        max_versions=4,
        max_bytes=2**30,
    )


async def assert_pulled(sources, source, folder) -> None:
    async with adapters(sources, folder) as held, held.hold(source) as adapter:
        file = (adapter.folder / "adapter_model.safetensors").read_bytes()
        assert safetensors_digest(file) == source.digest == adapter.digest
        PeftModel.from_pretrained(tiny_qwen3(), adapter.folder)
        assert len(load_file(adapter.folder / "adapter_model.safetensors")) == 28


async def test_a_version_comes_from_its_trainer_and_only_the_rest_of_it_after_a_break(tmp_path):
    async with trainer(str(tmp_path / "blobs")) as there:
        there.break_after = EXPORT_CHUNK_BYTES
        await assert_pulled(Sources(there.parts, None), there.source, tmp_path / "cache")
        assert there.num_bytes > EXPORT_CHUNK_BYTES
        whole = there.num_bytes
        there.num_bytes, there.break_after = 0, None
        await assert_pulled(Sources(there.parts, None), there.source, tmp_path / "again")
        assert there.num_bytes == whole


@pytest.mark.parametrize("away", ["ended", "restarted"])
async def test_a_version_whose_trainer_is_away_comes_from_the_blob_store(tmp_path, away):
    store = str(tmp_path / "blobs")
    async with contextlib.AsyncExitStack() as stack:
        async with trainer(store) as there:
            source = there.source
        if away == "restarted":
            another = await stack.enter_async_context(trainer(str(tmp_path / "others"), seed=1))
            # What it calls the same has other tensors.
            assert another.source.digest != source.digest
            source = replace(source, trainer_address=another.source.trainer_address)
        blobs = Blobs(store)
        await assert_pulled(Sources(there.parts, blobs), source, tmp_path / "cache")
        missing = replace(source, policy_version=7, export_key=f"versions/{'0' * 32}")
        error = NotFound if away == "restarted" else SourceUnavailable
        async with adapters(Sources(there.parts, blobs), tmp_path / "cache") as held:
            with pytest.raises(error):
                await held.pull(missing)

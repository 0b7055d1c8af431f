"""The real vLLM: what it loads and samples from is what was asked for, or nothing comes out.

Each of the bugs that made other systems sample from a wrong policy is put into the worker: the
first request that it would spoil fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from dataclasses import dataclass, replace
from typing import Any

import pytest
import pytest_asyncio

from rollmesh.errors import DigestMismatch, FailedPrecondition, InvalidRequest, Unavailable
from rollmesh.types import Continuation
from services.sampler.backends.base import Draw, LoadedAdapter
from services.sampler.config import SamplerConfig
from tests.contract.sampler_world import BASE_MODEL, World, make_world

vllm_arguments = pytest.importorskip("services.sampler.backends.vllm_arguments")

from services.sampler.backends.vllm import VllmBackend  # noqa: E402 - only where there is vLLM
from tests.contract import faulty_workers  # noqa: E402

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 6, 12, 7, 3]
# Longer than a block of the cache.
LONG_PROMPT = [2 + i % 40 for i in range(150)]
GREEDY = Draw(
    max_tokens=8,
    temperature=0,
    top_k=0,
    top_p=1.0,
    seed=1,
    stop=(),
    stop_token_ids=(),
    ignore_eos=True,
)


@dataclass
class Engine:
    """A backend on the world's model; what it says of adapters is by version."""

    backend: VllmBackend
    world: World

    def adapter(self, number: int, version: int, **changes: Any) -> LoadedAdapter:
        digest = self.world.export(version)[2]
        folder = self.world.folder / str(version)
        config = (folder / "adapter_config.json").read_text()
        return replace(LoadedAdapter(number, f"a@{number}", folder, digest, config), **changes)

    async def sample(self, adapter, draw=GREEDY, prompt=PROMPT, project="p") -> list[int]:
        deltas = self.backend.sample(adapter, prompt, [Continuation(0)], draw, project=project)
        async with contextlib.aclosing(deltas):
            return [token async for delta in deltas for token in delta.token_ids]

    async def break_(self, bug: str) -> None:
        await self.backend._alive().collective_rpc("break_", args=(bug,))

    async def mend(self) -> None:
        await self.backend._alive().collective_rpc("mend")

    async def forget_ways(self) -> None:
        await self.backend._alive().collective_rpc("forget_ways")

    async def knows_ways(self) -> bool:
        return (await self.backend._alive().collective_rpc("knows_ways"))[0]

    @contextlib.asynccontextmanager
    async def loaded(self, *adapters):
        """They are live while the block runs."""
        async with contextlib.AsyncExitStack() as stack:
            for adapter in adapters:
                await self.backend.load(adapter)
                stack.push_async_callback(self.backend.unload, adapter)
            yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@contextlib.asynccontextmanager
async def started(world: World):
    config = SamplerConfig.model_validate(
        {
            "base_model": {"name": BASE_MODEL, "path": str(world.model)},
            "dtype": "float32",
            "num_threads": 1,
            "max_rank": 16,
            "max_loras": 2,
            "kv_cache_memory": "64MiB",
            "chunk_tokens": 3,
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_arguments, "CPU_WORKER", faulty_workers.PATH)
        backend = VllmBackend(config)
        try:
            await backend.start()
            yield Engine(backend, world)
        finally:
            await backend.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world):
    """One that goes on; each test leaves it without adapters and without bugs."""
    async with started(world) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def dying(world):
    """One for a test that kills it."""
    async with started(world) as running:
        yield running


async def dies_of(engine: Engine, sampling, told: str) -> None:
    """No token comes out of `sampling`; the engine dies and says why."""
    with pytest.raises(Unavailable, match=told):
        await sampling
    async with asyncio.timeout(30):
        assert told in await engine.backend.failure()


async def test_the_engine_tells_what_it_has(engine):
    model = engine.backend._alive().model_config
    assert (model.get_vocab_size(), model.max_model_len) == (51, 512)
    async with asyncio.timeout(30):
        while engine.backend.silent_s() > 0.5:
            await asyncio.sleep(0.01)


async def test_versions_that_are_loaded_are_sampled(engine, world):
    one, two = engine.adapter(1, 0), engine.adapter(2, 1)
    async with engine.loaded(one, two):
        for adapter, version in ((one, 0), (None, None), (two, 1)):
            assert await engine.sample(adapter) == world.greedy(version, PROMPT, 8)
        mixed = [engine.sample(adapter) for adapter in (one, None, two)]
        greedy = [world.greedy(version, PROMPT, 8) for version in (0, None, 1)]
        assert await asyncio.gather(*mixed) == greedy


async def test_what_is_copied_samples_as_what_vllm_loaded(engine, world):
    await engine.forget_ways()
    for number, version in ((5, 1), (6, 2), (7, 1)):
        async with engine.loaded(engine.adapter(number, version)):
            assert await engine.knows_ways()
            assert await engine.sample(engine.adapter(number, version)) == world.greedy(
                version, PROMPT, 8
            )


async def test_slots_are_used_again(engine, world):
    """Many more loads than slots, of all versions."""
    for number in range(10, 18):
        version = number % 6
        async with engine.loaded(engine.adapter(number, version)):
            assert await engine.sample(engine.adapter(number, version)) == world.greedy(
                version, PROMPT, 8
            )


async def test_a_file_that_was_replaced_on_disk_is_not_loaded(engine, world, tmp_path):
    adapter = engine.adapter(40, 0, folder=tmp_path / "a")
    shutil.copytree(world.folder / "0", adapter.folder)
    shutil.copy(world.folder / "2" / "adapter_model.safetensors", adapter.folder)
    with pytest.raises(DigestMismatch, match="digest"):
        await engine.backend.load(adapter)
    async with engine.loaded(engine.adapter(41, 0), engine.adapter(42, 1)):
        """Both slots are free."""


async def test_an_adapter_loaded_again_under_its_number_does_not_keep_the_old_weights(engine):
    """vLLM takes what has a known number for loaded: the old weights would go on being sampled."""
    await engine.backend.load(engine.adapter(50, 0))
    with pytest.raises(DigestMismatch, match="does not hold"):
        await engine.backend.load(engine.adapter(50, 2))
    async with engine.loaded(engine.adapter(51, 2)):
        """What was taken out is out."""


@pytest.mark.parametrize(
    ("bug", "copied"),
    [
        ("weights_are_never_written", False),
        ("one_layer_is_left_out", False),
        ("the_scaling_is_forgotten", False),
        ("another_adapter_is_activated", False),
        ("copies_are_never_written", True),
        ("one_layer_is_left_out_of_copies", True),
        ("copies_are_of_another_adapter", True),
    ],
)
async def test_an_adapter_that_did_not_get_into_its_slot_is_never_live(engine, world, bug, copied):
    await engine.forget_ways()
    if copied:
        async with engine.loaded(engine.adapter(59, 4)):
            assert await engine.knows_ways()
    async with engine.loaded(engine.adapter(60, 0)):
        async with engine.loaded(engine.adapter(58, 1)):
            """The slot has something else, whatever it had before."""
        await engine.break_(bug)
        with pytest.raises(DigestMismatch, match="does not hold"):
            await engine.backend.load(engine.adapter(61, 4))
        await engine.mend()
        async with engine.loaded(engine.adapter(62, 2)):
            assert await engine.sample(engine.adapter(62, 2)) == world.greedy(2, PROMPT, 8)


async def test_a_way_that_forgets_the_scaling_is_never_used(engine, world):
    await engine.break_("copies_are_not_scaled")
    for number in (63, 64):
        async with engine.loaded(engine.adapter(number, 4)):
            assert not await engine.knows_ways()
            assert await engine.sample(engine.adapter(number, 4)) == world.greedy(4, PROMPT, 8)
    await engine.mend()


async def test_an_adapter_of_what_the_model_does_not_have_is_refused(engine, world, tmp_path):
    import safetensors.torch  # noqa: PLC0415

    from rollmesh.digest import safetensors_digest  # noqa: PLC0415

    shutil.copytree(world.folder / "0", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    renamed = {name.replace("layers.1.", "layers.7."): value for name, value in tensors.items()}
    safetensors.torch.save_file(renamed, file)
    digest = safetensors_digest(file.read_bytes())
    adapter = engine.adapter(70, 0, folder=tmp_path / "a", digest=digest)
    with pytest.raises(FailedPrecondition, match=r"no slots for .*layers\.7"):
        await engine.backend.load(adapter)


async def test_no_more_adapters_are_taken_than_there_are_slots(engine):
    """vLLM would throw one out by itself."""
    async with engine.loaded(engine.adapter(80, 0), engine.adapter(81, 1)):
        with pytest.raises(FailedPrecondition, match="slots are taken"):
            await engine.backend.load(engine.adapter(82, 2))
        assert await engine.sample(engine.adapter(80, 0))


async def test_the_configuration_counts_as_it_was_pulled(engine, world, tmp_path):
    adapter = engine.adapter(90, 0, folder=tmp_path / "a")
    shutil.copytree(world.folder / "0", adapter.folder)
    path = adapter.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 0}))
    async with engine.loaded(adapter):
        assert await engine.sample(adapter) == world.greedy(0, PROMPT, 8)


COSTLY = json.dumps(
    {"properties": {i: {"type": "string", "pattern": "a{1000}"} for i in range(300)}}
)


async def test_greedy_completions_of_one_request_are_all_drawn(engine, world):
    """vLLM itself takes more than one for a mistake."""
    wanted = [Continuation(index) for index in range(3)]
    found: dict[int, list[int]] = {each.index: [] for each in wanted}
    deltas = engine.backend.sample(None, PROMPT, wanted, GREEDY, project="p")
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            found[delta.index] += delta.token_ids
    assert found == dict.fromkeys(range(3), world.greedy(None, PROMPT, 8))


@pytest.mark.parametrize(
    ("field", "text", "told"),
    [
        ("json_schema", COSTLY, "too costly"),
        ("json_schema", '{"type": "integer", "multipleOf": 3}', "does not have"),
        ("json_schema", '{"type": "no such type"}', "type"),
        ("regex", "([", "regex"),
    ],
)
async def test_a_constraint_that_is_none_is_refused_and_the_next_one_is_not(
    engine, field, text, told
):
    with pytest.raises(InvalidRequest, match=told) as caught:
        await engine.sample(None, replace(GREEDY, **{field: text}))
    assert caught.value.context["field"] == f"params.{field}"
    allowed = replace(GREEDY, regex="[0-9]{3}", ignore_eos=False)
    assert len(await engine.sample(None, allowed)) == 4


async def test_tokens_that_the_base_model_would_make_do_not_come_out(dying):
    await dying.backend.load(dying.adapter(1, 0))
    await dying.break_("tokens_are_mapped_to_the_base_model")
    assert await dying.sample(None)
    await dies_of(dying, dying.sample(dying.adapter(1, 0)), "is computed with slot -1")


async def test_stale_blocks_of_the_prefix_cache_are_not_read(dying, tmp_path):
    """The next version has the name and the folder, so the cache's key, of the one before."""
    one = dying.adapter(1, 0, name="a", folder=tmp_path / "a")
    two = dying.adapter(2, 2, name="a", folder=tmp_path / "a")
    shutil.copytree(dying.world.folder / "0", one.folder)
    await dying.backend.load(one)
    assert await dying.sample(one, prompt=LONG_PROMPT)
    await dying.backend.unload(one)
    shutil.copytree(dying.world.folder / "2", two.folder, dirs_exist_ok=True)
    await dying.backend.load(two)
    await dies_of(dying, dying.sample(two, prompt=LONG_PROMPT), "reads keys and values")

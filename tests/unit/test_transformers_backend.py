"""The transformers backend: what it loads is read back, what it draws can be continued."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace

import pytest
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rollmesh.digest import safetensors_digest
from rollmesh.errors import DigestMismatch, FailedPrecondition
from rollmesh.types import Continuation
from services.sampler.backends import transformers_engine
from services.sampler.backends.base import LoadedAdapter
from services.sampler.backends.transformers import TransformersBackend
from services.sampler.config import SamplerConfig
from tests.contract.sampler_world import BASE_MODEL, make_world
from tests.unit.test_sampler_drawing import draw_of

PROMPT = [5, 6, 12, 7, 3]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@contextlib.asynccontextmanager
async def started(world, dtype="float32"):
    config = SamplerConfig.model_validate(
        {
            "base_model": {"name": BASE_MODEL, "path": str(world.model)},
            "backend": "transformers",
            "dtype": dtype,
            "num_threads": 1,
            "max_loras": 3,
        }
    )
    backend = TransformersBackend(config)
    try:
        model = await backend.start()
        assert (model.max_loras, model.kv_tokens) == (3, 0)
        yield backend
    finally:
        await backend.stop()


@pytest.fixture
async def backend(world):
    async with started(world) as backend:
        yield backend


def adapter_of(world, version, number=None) -> LoadedAdapter:
    number = version + 1 if number is None else number
    folder = world.folder / str(version)
    config = (folder / "adapter_config.json").read_text()
    return LoadedAdapter(number, f"a{number}", folder, world.export(version)[2], config)


async def draw(backend, adapter, continuations, **changes):
    """Token ids of each completion, by its index."""
    found = {each.index: [] for each in continuations}
    deltas = backend.sample(
        adapter, PROMPT, continuations, draw_of(max_tokens=12, **changes), project="p"
    )
    async for delta in deltas:
        found[delta.index] += delta.token_ids
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_adapters_come_and_go_and_each_is_the_one_that_draws(world, dtype):
    async with started(world, dtype) as backend:
        # As numbers, one is the beginning of another.
        first, other = adapter_of(world, 0, 1), adapter_of(world, 1, 12)
        await backend.load(first)
        await backend.load(other)
        if dtype == "float32":
            for version, adapter in ((0, first), (1, other), (None, None)):
                found = await draw(backend, adapter, [Continuation(0)], temperature=0.0)
                assert found[0] == world.greedy(version, PROMPT, 12)
        for adapter in (first, other):
            await backend.unload(adapter)
        await backend.load(first)


def spoilt(world, tmp_path, spoil) -> LoadedAdapter:
    """An adapter whose digest is right for its file, which `spoil` was given to change."""
    folder = tmp_path / "spoilt"
    shutil.copytree(world.folder / "0", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    digest = safetensors_digest((folder / "adapter_model.safetensors").read_bytes())
    return replace(adapter_of(world, 0, 7), folder=folder, digest=digest)


def drop(tensors):
    tensors.pop(next(iter(tensors)))


def rename(tensors):
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)


def cut(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:, 1:].contiguous()


def diverge(tensors):
    tensors[min(tensors)][0, 0] = float("nan")


@pytest.mark.parametrize("spoil", [drop, rename, cut, diverge])
async def test_what_does_not_fit_the_model_is_refused_and_leaves_nothing(
    world, backend, tmp_path, spoil
):
    with pytest.raises(FailedPrecondition) as caught:
        await backend.load(spoilt(world, tmp_path, spoil))
    assert not isinstance(caught.value, DigestMismatch)
    assert backend._engine._peft is None
    await backend.load(adapter_of(world, 1))
    with pytest.raises(FailedPrecondition):
        await backend.load(spoilt(world, tmp_path / "again", spoil))
    assert list(backend._engine._peft.peft_config) == ["adapter2"]


async def test_values_that_are_not_finite_are_refused_by_name(world, backend, tmp_path):
    with pytest.raises(FailedPrecondition, match=r"base_model.* not finite"):
        await backend.load(spoilt(world, tmp_path, diverge))


async def test_the_configuration_counts_as_it_was_pulled(world, backend, tmp_path):
    adapter = replace(adapter_of(world, 0), folder=tmp_path / "a")
    shutil.copytree(world.folder / "0", adapter.folder)
    (adapter.folder / "adapter_config.json").write_text("{")
    await backend.load(adapter)
    found = await draw(backend, adapter, [Continuation(0)], temperature=0.0)
    assert found[0] == world.greedy(0, PROMPT, 12)


@pytest.mark.parametrize("config", ["", "{", "[]", '{"peft_type": "LORA", "r": 0}'])
async def test_a_configuration_that_is_not_pefts_is_refused(world, backend, config):
    with pytest.raises(FailedPrecondition):
        await backend.load(replace(adapter_of(world, 0), config=config))


@pytest.mark.parametrize("change", ["other", "torn", "bit", "gone"])
async def test_a_file_that_is_not_what_the_digest_says_is_refused(world, backend, tmp_path, change):
    shutil.copytree(world.folder / "0", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    if change == "other":
        data = bytearray(world.export(2)[1])
    elif change == "torn":
        del data[len(data) // 2 :]
    else:
        data[-1] ^= 1
    path.write_bytes(data)
    if change == "gone":
        path.unlink()
    with pytest.raises(DigestMismatch):
        await backend.load(replace(adapter_of(world, 0), folder=tmp_path / "a"))


def test_the_names_of_peft_are_those_of_the_file(world):
    names = load_file(world.folder / "0" / "adapter_model.safetensors").keys()
    peft: PeftModel = world.policy(0)
    assert names == {key.replace(".default", "") for key in peft.state_dict() if ".default." in key}


async def test_what_peft_changes_on_the_way_is_noticed(world, backend, monkeypatch):
    def changing(model, tensors, adapter_name):
        name = next(iter(tensors))
        other = {**tensors, name: tensors[name] * (1 + 2**-23)}
        return set_peft_model_state_dict(model, other, adapter_name=adapter_name)

    monkeypatch.setattr(transformers_engine, "set_peft_model_state_dict", changing)
    with pytest.raises(DigestMismatch, match="other values"):
        await backend.load(adapter_of(world, 0))
    assert backend._engine._peft is None


async def test_completions_of_any_lengths_go_on_beside_each_other(world, backend):
    adapter = adapter_of(world, 0)
    await backend.load(adapter)
    whole = await draw(backend, adapter, [Continuation(index) for index in range(4)])
    begun = [
        Continuation(index, tuple(whole[index][:place]))
        for index, place in ((3, 5), (0, 0), (2, 5), (1, 11))
    ]
    rest = await draw(backend, adapter, begun)
    for each in begun:
        assert [*each.token_ids, *rest[each.index]] == whole[each.index]


async def test_a_prompts_logprobs_come_once(world, backend):
    deltas = backend.sample(
        None,
        PROMPT,
        [Continuation(0), Continuation(1, (3,))],
        draw_of(prompt_logprobs=2),
        project="p",
    )
    found = [delta.prompt_logprobs async for delta in deltas]
    assert [each is not None for each in found] == [True, *[False] * (len(found) - 1)]
    json.dumps(found[0].top_token_ids)  # plain numbers, none of torch's

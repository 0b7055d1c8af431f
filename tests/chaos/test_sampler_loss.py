"""A sampler that is killed or stands still costs its callers time, and not one token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest
import pytest_asyncio

from rollmesh import types
from tests.chaos.oracles import SAMPLERS, Oracles, oracles
from tests.fakes import oracle

NUM_COMPLETIONS = 8
# The base model draws token 0 alone; without it, all others are about as likely as each other.
DICE = types.SamplingParams(
    max_tokens=300, temperature=1.0, seed=7, logit_bias=((oracle.BASE_TOKEN, -100.0),)
)
PROMPT = list(range(1, 100))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory):
    async with oracles(tmp_path_factory.mktemp("mesh")) as running:
        yield running


async def nobody_lost(reason: str) -> None:
    """Another sampler goes on."""


def sampling(mesh: Oracles):
    return mesh.sampling.stream("red", oracle.BASE_MODEL, None, PROMPT, NUM_COMPLETIONS, DICE)


async def collected(stream, *, after_first=None):
    """The completions; `after_first` hears of the sampler of the first chunk."""
    chunks: list[list[types.CompletionChunk]] = [[] for _ in range(NUM_COMPLETIONS)]
    async with contextlib.aclosing(stream) as closing:
        async for chunk in closing:
            chunks[chunk.index].append(chunk)
            if after_first is not None and chunk.spans:
                after_first(chunk.spans[0].sampler)
                after_first = None
    return [types.join_chunks(of_one) for of_one in chunks]


def named(mesh: Oracles, instance_id: str) -> str:
    """The sampler whose process calls itself `instance_id`."""
    (address,) = [
        member.address
        for member in mesh.fleet.samplers(oracle.BASE_MODEL)
        if member.info.instance_id == instance_id
    ]
    return next(name for name in SAMPLERS if mesh.samplers[name].address == address)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(mesh):
    completions = await collected(sampling(mesh))
    assert len({completion.token_ids for completion in completions}) == NUM_COMPLETIONS
    return [completion.token_ids for completion in completions]


async def both_serve(mesh: Oracles) -> None:
    while len(mesh.fleet.samplers(oracle.BASE_MODEL)) < len(SAMPLERS):
        await asyncio.sleep(0.05)


@pytest.mark.asyncio(loop_scope="module")
async def test_completions_of_a_killed_sampler_go_on_elsewhere_token_for_token(mesh, undisturbed):
    await both_serve(mesh)
    killed = []

    def kill(instance_id: str) -> None:
        name = named(mesh, instance_id)
        os.kill(mesh.samplers[name].process.pid, signal.SIGKILL)
        killed.append(name)

    completions = await collected(sampling(mesh), after_first=kill)
    assert [completion.token_ids for completion in completions] == undisturbed
    assert any(len({span.sampler for span in c.spans}) == 2 for c in completions)
    await mesh.samplers[killed[0]].process.wait()
    await mesh.samplers[killed[0]].start()
    await mesh.samplers[killed[0]].until_serving()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("stalled", [Oracles.stalled, Oracles.engine_stalled])
async def test_completions_of_a_sampler_that_stands_still_go_on_elsewhere(
    mesh, undisturbed, stalled
):
    await both_serve(mesh)
    with contextlib.ExitStack() as stack:
        completions = await collected(
            sampling(mesh),
            after_first=lambda instance_id: stack.enter_context(
                stalled(mesh, named(mesh, instance_id))
            ),
        )
        assert [completion.token_ids for completion in completions] == undisturbed
        assert any(len({span.sampler for span in c.spans}) == 2 for c in completions)
    # Its processes were only held up: it serves again, and with the same instance.
    await both_serve(mesh)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_caller_that_leaves_frees_its_places_in_the_engine(mesh):
    await both_serve(mesh)
    async with contextlib.aclosing(sampling(mesh)) as stream:
        await anext(stream)
    ports = [member.port for member in mesh.fleet.samplers(oracle.BASE_MODEL)]
    async with asyncio.timeout(30):
        while any([(await port.get_sampler()).num_running for port in ports]):
            await asyncio.sleep(0.02)

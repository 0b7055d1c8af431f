"""A training op that is wrong is refused by name, and nobody's weights change by it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import pytest_asyncio

from rollmesh import types
from rollmesh.client import Client
from rollmesh.errors import AlreadyExists, InvalidRequest, NonFinite, NotFound, SequenceGap

pytestmark = pytest.mark.asyncio(loop_scope="session")

BASE_MODEL = "arith"
CROSS_ENTROPY = types.LossConfig("cross_entropy")
SAMPLED = types.LossConfig("importance_sampling")
ADAM = types.AdamConfig(1e-3)


def datum(length=6, **changes):
    tokens = np.arange(5, 5 + length, dtype=np.int32) % 100
    return types.Datum(**{"token_ids": tokens, "target_token_ids": tokens, **changes})


def tokens(*values):
    return np.array(values, np.int32)


def floats(*values):
    return np.array(values, np.float32)


WRONG_OPS = {
    "id beyond the vocabulary": ([datum(3, token_ids=tokens(5, 10**6, 7))], CROSS_ENTROPY),
    "negative id": ([datum(3, target_token_ids=tokens(5, -1, 7))], CROSS_ENTROPY),
    "over the context": ([datum(513)], CROSS_ENTROPY),
    "no tokens": ([datum(0)], CROSS_ENTROPY),
    "no data": ([], CROSS_ENTROPY),
    "other number of targets": ([datum(3, target_token_ids=tokens(5, 6))], CROSS_ENTROPY),
    "other number of weights": ([datum(3, weights=floats(1, 1))], CROSS_ENTROPY),
    "weight is NaN": ([datum(3, weights=floats(1, np.nan, 1))], CROSS_ENTROPY),
    "advantage is infinite": (
        [datum(3, sampling_logprobs=floats(-1, -1, -1), advantages=floats(1, np.inf, 1))],
        SAMPLED,
    ),
    "no advantages": ([datum(3, sampling_logprobs=floats(-1, -1, -1))], SAMPLED),
    "second datum is wrong": ([datum(), datum(3, weights=floats(np.inf, 1, 1))], CROSS_ENTROPY),
}
FIELDS = {
    "id beyond the vocabulary": "data[0].token_ids",
    "negative id": "data[0].target_token_ids",
    "over the context": "data[0].token_ids",
    "no tokens": "data[0].token_ids",
    "no data": "data",
    "other number of targets": "data[0].target_token_ids",
    "other number of weights": "data[0].weights",
    "weight is NaN": "data[0].weights",
    "advantage is infinite": "data[0].advantages",
    "no advantages": "data[0].advantages",
    "second datum is wrong": "data[1].weights",
}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def neighbours(mesh):
    """Adapters of two other tenants, with their weights' digests after a step."""
    names = ["projects/north/adapters/beside", "projects/south/adapters/beside"]
    async with Client(mesh.address) as client:
        for number, name in enumerate(names):
            await client.adapters.create(name, BASE_MODEL, types.LoraConfig(rank=4 + number))
            await client.training.forward_backward(name, 1, [datum()], CROSS_ENTROPY)
            await client.training.optim_step(name, 2, ADAM)
        return {name: (await client.adapters.publish(name)).digest for name in names}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def attacker(mesh):
    """An adapter that stays at sequence 1, whatever it is asked."""
    name = "projects/east/adapters/wrong"
    async with Client(mesh.address) as client:
        await client.adapters.create(name, BASE_MODEL, types.LoraConfig(rank=4))
    return name


async def unchanged(client, neighbours):
    """Whether each neighbour still has its weights and goes on where it was."""
    for name, digest in neighbours.items():
        assert (await client.adapters.publish(name)).digest == digest
        assert (await client.adapters.get(name)).next_sequence == 3


@pytest.mark.parametrize("wrong", WRONG_OPS)
async def test_a_wrong_batch_is_refused_by_its_field_and_changes_nothing(
    client, neighbours, attacker, wrong
):
    data, loss = WRONG_OPS[wrong]
    busy = [client.training.forward(name, [datum()]) for name in neighbours]
    refused, *others = await asyncio.gather(
        client.training.forward_backward(attacker, 1, data, loss), *busy, return_exceptions=True
    )
    assert isinstance(refused, InvalidRequest)
    assert refused.context["field"] == FIELDS[wrong]
    assert all(isinstance(found, types.ForwardResult) for found in others)
    assert (await client.adapters.get(attacker)).next_sequence == 1
    await unchanged(client, neighbours)


async def test_a_loss_that_overflows_fails_its_op_alone(client, neighbours):
    name = "projects/east/adapters/overflows"
    await client.adapters.create(name, BASE_MODEL, types.LoraConfig(rank=4))
    before = (await client.adapters.publish(name)).digest
    huge = datum(3, weights=floats(3e38, 3e38, 3e38))
    with pytest.raises(NonFinite) as caught:
        await client.training.forward_backward(name, 1, [datum(), huge], CROSS_ENTROPY)
    assert caught.value.context["field"] == "data[1]"
    adapter = await client.adapters.get(name)
    assert (adapter.next_sequence, adapter.policy_version) == (1, 0)
    assert (await client.adapters.publish(name)).digest == before
    await unchanged(client, neighbours)


async def test_a_gap_and_another_body_are_refused_with_what_is_expected(client, neighbours):
    name = "projects/east/adapters/order"
    await client.adapters.create(name, BASE_MODEL, types.LoraConfig(rank=4))
    with pytest.raises(SequenceGap) as gap:
        await client.training.forward_backward(name, 2, [datum()], CROSS_ENTROPY)
    assert gap.value.context["expected_sequence"] == "1"
    first = await client.training.forward_backward(name, 1, [datum()], CROSS_ENTROPY)
    again = await client.training.forward_backward(name, 1, [datum()], CROSS_ENTROPY)
    assert again.logprobs[0].tobytes() == first.logprobs[0].tobytes()
    assert again.metrics == first.metrics
    with pytest.raises(AlreadyExists) as other:
        await client.training.forward_backward(name, 1, [datum(5)], CROSS_ENTROPY)
    assert other.value.context["expected_sequence"] == "2"
    assert (await client.adapters.get(name)).next_sequence == 2
    await unchanged(client, neighbours)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../../etc/passwd",
        "projects/east/adapters/../../secret",
        "projects/east/adapters//etc",
        "projects/east/adapters/..",
        "projects/east/adapters/A",
        "",
    ],
)
async def test_a_name_that_is_a_path_is_refused_everywhere(client, neighbours, name):
    checkpoint = f"{name}/checkpoints/c"
    calls = [
        client.adapters.create(name, BASE_MODEL, types.LoraConfig(rank=4)),
        client.adapters.get(name),
        client.adapters.delete(name),
        client.adapters.publish(name),
        client.adapters.fork(name, "projects/east/adapters/a/checkpoints/c"),
        client.training.forward_backward(name, 1, [datum()], CROSS_ENTROPY),
        client.training.forward(name, [datum()]),
        client.training.optim_step(name, 1, ADAM),
        client.training.load_checkpoint(name, 1, checkpoint, with_optimizer=False),
        client.checkpoints.create(checkpoint),
        client.checkpoints.get(checkpoint),
        client.checkpoints.delete(checkpoint),
    ]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, InvalidRequest), error
        assert error.context["field"] in {"name", "adapter", "checkpoint"}
    await unchanged(client, neighbours)


async def test_a_checkpoint_of_another_project_does_not_exist(client, neighbours, attacker):
    theirs = f"{next(iter(neighbours))}/checkpoints/mine"
    await client.checkpoints.create(theirs)
    with pytest.raises(NotFound):
        await client.adapters.fork("projects/east/adapters/stolen", theirs)
    await unchanged(client, neighbours)

"""An adapter's bits are its own: the same alone and beside any neighbours."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rollmesh.errors import NonFinite
from rollmesh.types import AdamConfig, LossConfig
from services.trainer.engine import Engine
from services.trainer.model import Model
from services.trainer.optimizer import adam_step, fresh_state
from services.trainer.requests import Request, advance, next_pass
from tests.fakes.tiny_qwen3 import TARGETS, VOCAB_SIZE, batch, tiny_qwen3

STEPS = 20
ADAM = AdamConfig(learning_rate=1e-2, max_grad_norm=1.0)
CONFIG = LossConfig("importance_sampling", kl_coefficient=0.1)
ODD = {"vocab_size": VOCAB_SIZE + 5, "hidden_size": 24, "intermediate_size": 40}


@functools.cache
def model(**changes):
    module = tiny_qwen3(**{**ODD, "max_position_embeddings": 160, **changes})
    return Model(module, max_batch_tokens=8192)


@dataclass
class Tenant:
    """An adapter and the batches that it trains on, one a step."""

    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = TARGETS
    config: LossConfig = CONFIG
    lengths: tuple[int, ...] = (40, 3, 70, 33, 31, 64)
    seed: int = 0
    spoil: float = 1.0  # what its factors, advantages and weights are multiplied by
    spoiled: str = "advantages"
    begin: int = 0
    end: int = STEPS
    backward: bool = True
    measured: bool = False  # a loss without gradients

    def start(self, model):
        weights = model.lora.fresh(
            rank=self.rank, alpha=self.alpha, target_modules=self.targets, seed=self.seed
        )
        generator = torch.Generator().manual_seed(self.seed)
        scale = self.spoil if self.spoiled == "factors" else 0.1
        self.weights = weights.replaced(
            [p + scale * torch.randn(p.shape, generator=generator) for p in weights.parameters()]
        )
        self.adam = fresh_state(self.weights.parameters())
        self.history = []

    def data(self, step):
        data = batch(
            self.lengths, seed=100 * self.seed + step, sampled=self.config.loss != "cross_entropy"
        )
        if self.spoil != 1 and self.spoiled in {"advantages", "weights"}:
            values = [getattr(datum, self.spoiled) for datum in data]
            with np.errstate(all="ignore"):
                return [
                    datum
                    if value is None
                    else replace(datum, **{self.spoiled: value * np.float32(self.spoil)})
                    for datum, value in zip(data, values, strict=True)
                ]
        return data

    def request(self, model, step):
        return Request(
            self.weights,
            self.data(step),
            self.config if self.backward or self.measured else None,
            max_length=model.max_length,
            max_tokens=64,
            backward=self.backward,
        )

    def finish(self, request):
        """Step as a trainer does, and note every bit of what came out."""
        try:
            if request.error is not None:
                raise request.error
            if not self.backward:
                result = request.result({})
                bits = [logprobs.tobytes() for logprobs in result.logprobs]
                self.history.append((bits, result.metrics))
                return
            found = request.gradients({})
            step = adam_step(self.weights.parameters(), found.gradients, self.adam, ADAM)
        except NonFinite as error:
            self.history.append(str(error))
            return
        self.weights, self.adam = self.weights.replaced(step.parameters), step.state
        self.history.append(
            (
                found.metrics,
                [logprobs.tobytes() for logprobs in found.logprobs],
                step.grad_norm,
                [gradient.numpy().tobytes() for gradient in found.gradients],
                [parameter.numpy().tobytes() for parameter in step.parameters],
            )
        )


def train(model, tenants, steps=STEPS, budget=8192):
    """All tenants in shared passes, each in those steps in which it exists."""
    for step in range(steps):
        for tenant in tenants:
            if tenant.begin == step:
                tenant.start(model)
        present = [tenant for tenant in tenants if tenant.begin <= step < tenant.end]
        requests = [tenant.request(model, step) for tenant in present]
        waiting = list(requests)
        while waiting:
            advance(next_pass(waiting, budget), model.run_pass)
            waiting = [request for request in waiting if request.next_unit is not None]
        for tenant, request in zip(present, requests, strict=True):
            tenant.finish(request)
    return tenants[0].history


def hostile(num_steps=STEPS, max_length=150):
    losses = st.sampled_from(
        ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"]
    )
    configs = st.builds(
        LossConfig,
        losses,
        st.sampled_from([None, 0.0, 0.5]),
        entropy=st.booleans(),
        temperature=st.sampled_from([None, 1e-30, 0.5, 2.0]),
    )
    all_targets = (*TARGETS, "lm_head")
    return st.builds(
        Tenant,
        rank=st.integers(1, 9),
        alpha=st.sampled_from([0.1, 16.0, 1e30]),
        targets=st.sets(st.sampled_from(all_targets), min_size=1).map(tuple),
        config=configs,
        lengths=st.lists(st.integers(1, max_length), min_size=1, max_size=2).map(tuple),
        seed=st.integers(1, 9),
        spoil=st.sampled_from([1.0, 1.0, 1e30, -1e38, float("inf"), float("nan")]),
        spoiled=st.sampled_from(["advantages", "weights", "factors"]),
        begin=st.integers(0, num_steps // 2),
        end=st.integers(1, num_steps),
        backward=st.sampled_from([True, True, True, False]),
        measured=st.booleans(),
    )


OBSERVED = (
    {},
    {"config": LossConfig("cross_entropy", entropy=True), "targets": (*TARGETS, "lm_head")},
    {
        "config": LossConfig("ppo", temperature=0.7),
        "targets": ("down_proj",),
        "lengths": (5, 5, 100, 12),
    },
    {"config": LossConfig("gspo", 0.1, entropy=True), "backward": False, "measured": True},
    {
        "config": LossConfig(
            "stable_reinforce", 0.1, max_sequence_ratio=9.0, sampler_kl_coefficient=0.1
        )
    },
)


@functools.cache
def alone(index):
    return train(model(), [Tenant(**OBSERVED[index])])


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # making an example smaller would take minutes
)
@given(
    neighbours=st.lists(hostile(), min_size=1, max_size=15),
    index=st.integers(0, len(OBSERVED) - 1),
    budget=st.sampled_from([192, 8192]),
)
def test_twenty_steps_beside_hostile_neighbours_are_bit_for_bit_those_alone(
    neighbours, index, budget
):
    torch.set_num_threads(1)
    expected = alone(index)
    assert len(expected) == STEPS
    assert not any(isinstance(step, str) for step in expected)  # the observed one itself is well
    tenants = [Tenant(**OBSERVED[index]), *neighbours]
    assert train(model(), tenants, budget=budget) == expected


def crowd(seed, num=15):
    """The same hostile neighbours for a seed, without hypothesis."""
    rng = np.random.default_rng(seed)
    return [
        Tenant(
            rank=int(rng.integers(1, 33)),
            targets=tuple(rng.choice((*TARGETS, "lm_head"), rng.integers(1, 8), replace=False)),
            config=LossConfig(str(rng.choice(["cross_entropy", "importance_sampling", "gspo"]))),
            lengths=tuple(rng.integers(1, 160, 4).tolist()),
            seed=number + 1,
            spoil=float(rng.choice([1, 1e30, np.inf, np.nan])),
            spoiled=str(rng.choice(["advantages", "weights", "factors"])),
        )
        for number in range(num)
    ]


LARGE = {"vocab_size": 515, "hidden_size": 128, "intermediate_size": 344, "head_dim": 32}


def test_a_context_that_is_no_multiple_of_32_is_used_as_far_as_bits_allow():
    """Gradients of units of another length change with the neighbours."""
    torch.set_num_threads(2)
    try:
        odd = model(**LARGE, max_position_embeddings=39)
        assert odd.max_length == 32
        neighbours = [replace(tenant, lengths=(32, 2, 7, 7)) for tenant in crowd(1, 3)]
        expected = train(odd, [Tenant(lengths=(32,))], steps=2)
        assert train(odd, [Tenant(lengths=(32,)), *neighbours], steps=2) == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_several_threads_change_nothing_about_that(num_threads):
    torch.set_num_threads(num_threads)
    try:
        large = model(**LARGE)
        expected = train(large, [Tenant(rank=8)], steps=2)
        for number in (1, 5, 15):
            assert train(large, [Tenant(rank=8), *crowd(number, number)], steps=2) == expected
            assert len(expected) == 2
    finally:
        torch.set_num_threads(1)


async def steps_of(engine, name, tenant):
    """Three steps by way of the engine, and what they gave."""
    history = []
    for step in range(3):
        data = tenant.data(step)
        try:
            found = await engine.forward_backward(name, tenant.weights, data, tenant.config)
            state = (tenant.weights.parameters(), found.gradients, tenant.adam, ADAM)
            taken = await engine.run(adam_step, *state)
        except NonFinite as error:
            history.append(str(error))
            continue
        tenant.weights, tenant.adam = tenant.weights.replaced(taken.parameters), taken.state
        bits = [parameter.numpy().tobytes() for parameter in taken.parameters]
        history.append((found.metrics["loss"], taken.grad_norm, bits))
    return history


async def test_bits_are_the_same_through_the_engine_whatever_it_fuses():
    torch.set_num_threads(1)
    histories = []
    for neighbours in ([], crowd(3)):
        tenants = [*neighbours[:7], Tenant(), *neighbours[7:]]
        for tenant in tenants:
            tenant.start(model())
        with contextlib.closing(Engine(model(), max_queued_ops=64)) as engine:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(steps_of(engine, f"adapter {index}", tenant))
                    for index, tenant in enumerate(tenants)
                ]
        histories.append(running[len(neighbours[:7])].result())
    assert len(histories[0]) == 3
    assert not any(isinstance(step, str) for step in histories[0])
    assert histories[0] == histories[1]

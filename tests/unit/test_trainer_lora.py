"""Linear layers that adapters share."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from services.trainer.linear import whole_vectors
from services.trainer.lora import LoraLayers, Rows
from tests.fakes.tiny_qwen3 import TARGETS, tiny_model


def net(num_inputs=128, num_outputs=96, *, bias=True, dtype=torch.float32):
    """A model of one layer."""
    torch.manual_seed(0)
    module = nn.Sequential()
    module.add_module("proj", nn.Linear(num_inputs, num_outputs, bias=bias, dtype=dtype))
    return module.requires_grad_(requires_grad=False)


def random_weights(layers, *, rank, seed, targets=("proj",)):
    fresh = layers.fresh(rank=rank, alpha=3.0, target_modules=targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return fresh.replaced([torch.randn(p.shape, generator=generator) for p in fresh.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_each_segment_is_the_layer_with_its_own_update_and_the_rest_is_the_layer(bias, dtype):
    module = net(bias=bias, dtype=dtype)
    layer = module.proj
    plain = lambda x: nn.functional.linear(x, layer.weight, layer.bias)  # noqa: E731
    layers = LoraLayers(module, None)
    segments = [(0, 32, 3), (32, 128, 8), (200, 300, 1)]
    parts = [
        Rows(start, stop, random_weights(layers, rank=rank, seed=rank), {})
        for start, stop, rank in segments
    ]
    x = torch.randn(3, 100, 128, dtype=dtype).requires_grad_()
    gy = torch.randn(3, 100, 96, dtype=dtype)
    with layers.active(parts):
        y = module(x)
    (gx,) = torch.autograd.grad(y, x, gy)

    leaves = [p.clone().requires_grad_() for part in parts for p in part.weights.parameters()]
    rows = plain(x.reshape(300, 128))
    pieces = list(rows.split(1))
    for part, a, b in zip(parts, leaves[::2], leaves[1::2], strict=True):
        own = slice(part.start, part.stop)
        update = part.weights.scale * x.reshape(300, 128)[own].float() @ a.t() @ b.t()
        pieces[own] = (rows[own] + update).to(dtype).split(1)
    expected = torch.cat(pieces).view(3, 100, 96)
    found = [gx, *(gradient for part in parts for gradient in part.gradients["proj"])]
    wanted = torch.autograd.grad(expected, [x, *leaves], gy)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip([y, *found], [expected, *wanted], strict=True):
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_has_the_same_bits_wherever_it_stands_and_however_many_there_are(num_threads):
    module = net(384, 200)
    LoraLayers(module, None)
    torch.set_num_threads(num_threads)
    try:
        row, gy = torch.randn(1, 384), torch.randn(1, 200)

        def bits(num_rows, place):
            x, g = torch.randn(num_rows, 384), torch.randn(num_rows, 200)
            x[:] = torch.tensor(float("nan"))  # the worst of neighbours
            x[place], g[place] = row, gy
            x.requires_grad_()
            y = module(x)
            return [y[place].tolist(), torch.autograd.grad(y, x, g)[0][place].tolist()]

        expected = bits(1, 0)
        for num_rows, place in [(7, 3), (16, 15), (100, 41), (256, 0), (300, 299), (1000, 600)]:
            assert bits(num_rows, place) == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "function",
    [
        nn.functional.silu,
        nn.functional.gelu,
        pytest.param(partial(nn.functional.gelu, approximate="tanh"), id="gelu_tanh"),
    ],
)
@pytest.mark.parametrize("value", [0.7371, -1.2345, 2.9])
def test_an_activation_gives_an_element_the_same_bits_wherever_it_stands(
    function, value, num_threads
):
    torch.set_num_threads(num_threads)
    try:
        apply = whole_vectors(function)
        for size in (1, 7, 33, 17_001, 25_003, 40_001, 70_000, 100_003):
            x = torch.full((size,), value, requires_grad=True)
            y = apply(x)
            (gx,) = torch.autograd.grad(y.sum(), x)
            assert len(set(y.tolist())) == 1
            assert len(set(gx.tolist())) == 1
    finally:
        torch.set_num_threads(1)


def test_targets_are_last_parts_of_names_and_the_unembedding_is_one_for_who_asks_for_it():
    lora = tiny_model().lora
    assert set(lora.target_modules) == set(TARGETS)
    assert lora.unembedding == "lm_head"
    weights = lora.fresh(rank=2, alpha=4.0, target_modules=("lm_head",), seed=0)
    assert list(weights.factors) == ["lm_head"]
    weights = lora.fresh(rank=1, alpha=1.0, target_modules=("v_proj",), seed=0)
    assert list(weights.factors) == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]

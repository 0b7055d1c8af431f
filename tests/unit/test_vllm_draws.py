"""The random draws of vLLM's worker: pure functions of seed, completion and place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from services.sampler.backends import vllm_draws
from services.sampler.backends.vllm_draws import drawn, gumbel, stream, words_at

current_platform.import_kernels()  # those for this processor

NUM_DRAWS = 40_000
PROBS = [0.5, 0.25, 0.15, 0.08, 0.02]


@pytest.fixture(params=["kernel", "torch"])
def draw(request):
    """The two ways to draw: vLLM's kernel on CPUs, torch elsewhere."""
    if request.param == "kernel":
        return drawn
    return lambda logits, words: (logits + gumbel(words, logits.shape[1])).argmax(-1)


def words(seeds=(7,), indices=(0,), places=(0,)) -> torch.Tensor:
    """One word for each combination."""
    streams = np.array([stream(s, i) for s in seeds for i in indices for _ in places], np.uint64)
    return words_at(streams, np.tile(np.array(places), len(seeds) * len(indices)))


@pytest.mark.parametrize(
    "varied",
    [
        {"places": range(NUM_DRAWS)},
        {"indices": range(NUM_DRAWS)},
        {"seeds": range(NUM_DRAWS)},
        {"seeds": range(2**61, 2**61 + 200), "places": range(200)},
    ],
    ids=["places", "completions", "seeds", "neighbours of both"],
)
def test_draws_have_the_distribution(draw, varied):
    logits = torch.tensor(PROBS).log().repeat(NUM_DRAWS, 1)
    tokens = draw(logits, words(**varied))
    shares = torch.bincount(tokens, minlength=len(PROBS)) / NUM_DRAWS
    # Five standard deviations.
    for share, prob in zip(shares.tolist(), PROBS, strict=True):
        assert share == pytest.approx(prob, abs=5 * (prob * (1 - prob) / NUM_DRAWS) ** 0.5)


@pytest.mark.parametrize(
    "varied",
    [{"places": (4, 5)}, {"indices": (4, 5)}, {"seeds": (4, 5)}],
    ids=["places", "completions", "seeds"],
)
def test_neighbours_draw_independently(draw, varied):
    """Two rows of noise over many equal tokens have nothing in common."""
    size = 20_000
    both = [gumbel(words(**varied), size)[row] for row in (0, 1)]
    assert abs(torch.corrcoef(torch.stack(both))[0, 1].item()) < 5 / size**0.5
    tokens = draw(torch.zeros(2, size), words(**varied))
    assert tokens[0] != tokens[1]


def test_a_draw_depends_on_nothing_but_its_logits_and_word(draw):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=rng)
    some = words(places=range(64))
    together = draw(logits.clone(), some)
    order = torch.randperm(64, generator=rng)
    assert torch.equal(draw(logits[order].clone(), some[order]), together[order])
    alone = [draw(logits[row : row + 1].clone(), some[row : row + 1])[0] for row in range(64)]
    assert torch.equal(torch.stack(alone), together)


def test_tokens_that_are_cut_off_are_never_drawn(draw):
    logits = torch.full((1000, 50), -torch.inf)
    logits[:, [3, 41]] = torch.tensor([0.0, -2.0])
    assert set(draw(logits, words(places=range(1000))).tolist()) == {3, 41}


def test_streams_of_other_requests_and_completions_do_not_overlap():
    """Seeds count up, and so do completions and places: no two of them meet."""
    found = words(seeds=range(40), indices=range(40), places=range(40))
    assert len(set(found.tolist())) == 40**3


def test_noise_has_the_tails_of_the_distribution():
    noise = gumbel(words(places=range(400)), 5_000).double()
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.005)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.02)
    # P(noise > x) is about exp(-x): of 2 million, 120 beyond 9.7.
    assert (noise > 9.7).sum().item() == pytest.approx(2e6 * np.exp(-9.7), rel=0.5)


def test_the_noise_is_the_same_wherever_it_is_computed():
    """Plain numpy integers give the same hash."""
    word = words(seeds=(3,), places=(9,))
    tokens = np.arange(1, 101, dtype=np.uint64)
    hashed = vllm_draws.mixed(word.numpy().view(np.uint64) + tokens * np.uint64(0x9E3779B97F4A7C15))
    uniform = ((hashed >> np.uint64(24)).astype(np.float64) + 0.5) * 2.0**-40
    expected = -np.log(-np.log1p(-uniform))
    assert np.allclose(gumbel(word, 100)[0].numpy(), expected, atol=1e-4)

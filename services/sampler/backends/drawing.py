"""Drawing tokens from logits, in torch.

Each draw is a function of what is drawn from, and of the seed, the completion's index and the
token's place in it.

Shapes: N completions, V tokens in the vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from services.sampler.validation import mixed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.sampler.backends.base import Draw


def drawn(
    logits_NV: torch.Tensor,  # noqa: N803 - the suffix is the shape
    draw: Draw,
    places: Sequence[tuple[int, int]],
) -> tuple[list[int], list[float]]:
    """A token id for each row of float32 logits, and its log-probability of the draw's kind.

    places: of each row, the completion's index and the new token's place in it.
    """
    biased_NV = _biased(logits_NV, draw)  # noqa: N806
    if draw.temperature == 0:
        token_ids_N1 = biased_NV.argmax(-1, keepdim=True)  # noqa: N806
        sampled_N1 = torch.zeros_like(token_ids_N1, dtype=torch.float32)  # noqa: N806
    else:
        probs_NV = _probs(biased_NV, draw)  # noqa: N806
        token_ids_N1 = _at(_uniforms(draw.seed, places), probs_NV)  # noqa: N806
        sampled_N1 = probs_NV.gather(1, token_ids_N1).log()  # noqa: N806
    if draw.logprobs_kind == "policy":
        logprobs_N1 = logits_NV.log_softmax(-1).gather(1, token_ids_N1)  # noqa: N806
    else:
        logprobs_N1 = sampled_N1  # noqa: N806
    return token_ids_N1[:, 0].tolist(), logprobs_N1[:, 0].tolist()


def likeliest(
    logits_NV: torch.Tensor,  # noqa: N803
    draw: Draw,
) -> tuple[list[list[int]], list[list[float]]]:
    """Of each row the `top_logprobs` likeliest tokens, and their log-probabilities of its kind.

    Where fewer can be drawn the rest is -1, with -inf.
    """
    if draw.logprobs_kind == "policy":
        logprobs_NV = logits_NV.log_softmax(-1)  # noqa: N806
    elif draw.temperature == 0:
        biased_NV = _biased(logits_NV, draw)  # noqa: N806
        logprobs_NV = torch.full_like(biased_NV, -math.inf)  # noqa: N806
        logprobs_NV.scatter_(1, biased_NV.argmax(-1, keepdim=True), 0.0)
    else:
        logprobs_NV = _probs(_biased(logits_NV, draw), draw).log()  # noqa: N806
    top = logprobs_NV.topk(draw.top_logprobs or 0)
    return top.indices.masked_fill(top.values == -math.inf, -1).tolist(), top.values.tolist()


def _biased(logits_NV: torch.Tensor, draw: Draw) -> torch.Tensor:  # noqa: N803
    """Float64 logits [N, V], so that no bias costs bits of what it is added to."""
    biased_NV = logits_NV.double()  # noqa: N806
    if draw.logit_bias:
        token_ids, biases = zip(*draw.logit_bias, strict=True)
        biased_NV[:, list(token_ids)] += biased_NV.new_tensor(biases)
    return biased_NV


def _probs(logits_NV: torch.Tensor, draw: Draw) -> torch.Tensor:  # noqa: N803
    """What is drawn from, [N, V]: temperature, min_p, top_k and top_p, in vLLM's order."""
    logits_NV = logits_NV / draw.temperature  # noqa: N806
    if draw.min_p:
        least_N1 = logits_NV.max(-1, keepdim=True).values + math.log(draw.min_p)  # noqa: N806
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -math.inf)  # noqa: N806
    if draw.top_k:
        least_N1 = logits_NV.topk(draw.top_k).values[:, -1:]  # noqa: N806
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -math.inf)  # noqa: N806
    probs_NV = logits_NV.softmax(-1)  # noqa: N806
    if draw.top_p < 1:
        sorted_NV, order_NV = probs_NV.sort(-1, descending=True)  # noqa: N806
        # A token stays if those before it do not make up top_p yet; so the first always does.
        before_NV = sorted_NV.cumsum(-1) - sorted_NV  # noqa: N806
        sorted_NV = sorted_NV.masked_fill(before_NV >= draw.top_p, 0.0)  # noqa: N806
        probs_NV = torch.zeros_like(probs_NV).scatter(1, order_NV, sorted_NV)  # noqa: N806
        probs_NV /= probs_NV.sum(-1, keepdim=True)  # noqa: N806
    return probs_NV


def _uniforms(seed: int, places: Sequence[tuple[int, int]]) -> list[float]:
    """A number in [0, 1) for each place: the 53 highest of 62 bits, as many as a float holds."""
    return [(mixed(mixed(seed, index), place) >> 9) / 2**53 for index, place in places]


def _at(uniforms: list[float], probs_NV: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Where each row's running total first exceeds its uniform number, [N, 1].

    So a token of probability 0 is never drawn, and rounding that differs between batches changes a
    draw only where the number is as near to a border as that.
    """
    totals_NV = probs_NV.cumsum(-1)  # noqa: N806
    wanted_N1 = totals_NV.new_tensor(uniforms)[:, None] * totals_NV[:, -1:]  # noqa: N806
    return torch.searchsorted(totals_NV, wanted_N1, right=True)

"""Random draws in vLLM's worker: each a pure function of seed, completion and place.

A completion that another sampler continues goes on with the draws that it would have had, and
neither the batch, nor a preemption, nor the order of requests changes a draw. vLLM's own
generators, one for each request, can do none of that.

Shapes: N rows of the batch, V tokens in the vocabulary, K log-probabilities of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from services.sampler.splitmix import FACTORS, STEP, WORD, finished

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.v1.sample.metadata import SamplingMetadata

_GREEDY = 1e-5
"""vLLM's own bound: a lower temperature is greedy."""


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """As splitmix64's `finished`, of each word; much faster for many."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(FACTORS[0])
    words = (words ^ (words >> np.uint64(27))) * np.uint64(FACTORS[1])
    return words ^ (words >> np.uint64(31))


def stream(seed: int, index: int) -> int:
    """The random stream of completion `index` of a request, in [0, 2**64)."""
    start = finished(((seed + 1) * STEP) & WORD)
    return finished((start + index * STEP) & WORD)


def words_at(streams: NDArray[np.uint64], places: NDArray[np.int64]) -> torch.Tensor:
    """The word that decides each draw, int64 [N]: place `places[i]` of stream `streams[i]`."""
    words = mixed(streams + places.astype(np.uint64) * np.uint64(STEP))
    return torch.from_numpy(words.view(np.int64))


def drawn(logits_NV: torch.Tensor, words_N: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """One token id of each row, int64 [N]: the largest of its float32 logits plus Gumbel noise."""
    if logits_NV.device.type == "cpu":
        # Its noise is a hash of word and token, too; other bits, the same distribution.
        tokens: torch.Tensor = torch.ops._C.fused_gumbel_argmax(logits_NV.contiguous(), words_N)  # noqa: SLF001
        return tokens.long()
    return (logits_NV + gumbel(words_N.to(logits_NV.device), logits_NV.shape[1])).argmax(-1)


def gumbel(words_N: torch.Tensor, vocab_size: int) -> torch.Tensor:  # noqa: N803
    """Float32 noise [N, V]: of each word and token another, on every device the same hash.

    Not that of vLLM's kernel for CPUs: a completion that a sampler of another kind, of device or
    of backend, goes on with gets other draws of the same distribution from there.
    """
    tokens_V = torch.arange(1, vocab_size + 1, device=words_N.device)  # noqa: N806
    hash_NV = words_N[:, None] + tokens_V * _signed(STEP)  # noqa: N806
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        hash_NV = (hash_NV ^ _shifted(hash_NV, shift)) * _signed(factor)  # noqa: N806
    hash_NV = hash_NV ^ _shifted(hash_NV, 31)  # noqa: N806
    # 40 bits: near 0, where the largest noise comes from, float32 has finer steps than near 1.
    uniform_NV = (_shifted(hash_NV, 24).float() + 0.5) * 2.0**-40  # noqa: N806
    return -torch.log(-torch.log1p(-uniform_NV.clamp(max=1 - 2.0**-24)))


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros: torch's own shift of int64 copies the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


@dataclass(frozen=True)
class Rows:
    """What the rows of a batch draw with. `sampled`: who wants log-probabilities of that kind."""

    streams: NDArray[np.uint64]
    places: NDArray[np.int64]
    sampled: NDArray[np.bool_]


class CounterSampler(Sampler):  # type: ignore[misc]  # vLLM is untyped to mypy
    """vLLM's sampler, with these draws and with both kinds of log-probabilities.

    Attributes:
        rows: of the batch at hand. None in vLLM's own rehearsals.
        policy_logprobs: log-softmax [N, V] of the batch at hand, where its logits are about to lose
            it to a constraint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: Rows | None = None
        self.policy_logprobs: torch.Tensor | None = None

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        *_: Any,
        **__: Any,
    ) -> SamplerOutput:
        """Draw a token of each row."""
        wanted = sampling_metadata.max_num_logprobs is not None
        policy_NV, self.policy_logprobs = self.policy_logprobs, None  # noqa: N806
        if policy_NV is None and wanted:
            policy_NV = self.compute_logprobs(logits)  # noqa: N806
        logits_NV = self.apply_logits_processors(  # noqa: N806
            logits.to(torch.float32), sampling_metadata, predict_bonus_token=False
        )
        tokens_N, logits_NV = self._drawn(logits_NV, sampling_metadata)  # noqa: N806
        return SamplerOutput(
            sampled_token_ids=tokens_N.to(torch.int32)[:, None],
            logprobs_tensors=self._logprobs(policy_NV, logits_NV, tokens_N, sampling_metadata)
            if wanted
            else None,
        )

    def _drawn(
        self,
        logits_NV: torch.Tensor,  # noqa: N803
        metadata: SamplingMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [N], and the logits of the distribution that they are drawn from."""
        greedy_N = None if metadata.all_random else self.greedy_sample(logits_NV).long()  # noqa: N806
        if metadata.all_greedy:
            assert greedy_N is not None  # noqa: S101 - a batch is not both
            return greedy_N, logits_NV
        logits_NV = self.apply_temperature(logits_NV, metadata.temperature, metadata.all_random)  # noqa: N806
        for processor in metadata.logitsprocs.argmax_invariant:
            logits_NV = processor.apply(logits_NV)  # noqa: N806
        logits_NV = apply_top_k_top_p(logits_NV, metadata.top_k, metadata.top_p)  # noqa: N806
        tokens_N = drawn(logits_NV, self._words(len(logits_NV)))  # noqa: N806
        if greedy_N is not None:
            tokens_N = torch.where(metadata.temperature < _GREEDY, greedy_N, tokens_N)  # noqa: N806
        return tokens_N, logits_NV

    def _words(self, num_rows: int) -> torch.Tensor:
        if self.rows is None:
            return torch.zeros(num_rows, dtype=torch.int64)
        return words_at(self.rows.streams, self.rows.places)

    def _logprobs(
        self,
        policy_NV: torch.Tensor | None,  # noqa: N803
        logits_NV: torch.Tensor,  # noqa: N803
        tokens_N: torch.Tensor,  # noqa: N803
        metadata: SamplingMetadata,
    ) -> LogprobsTensors:
        """Of the drawn tokens and the likeliest, of the kind of each row. Ranks nobody asks for."""
        assert policy_NV is not None  # noqa: S101 - computed where logprobs are wanted
        tokens_N1, num_top = tokens_N[:, None], metadata.max_num_logprobs  # noqa: N806
        ids_NK, logprobs_NK = _with_likeliest(policy_NV, tokens_N1, num_top)  # noqa: N806
        if self.rows is not None and self.rows.sampled.any():
            sampled_NV = self.compute_logprobs(logits_NV)  # noqa: N806
            of_sampled = list(_with_likeliest(sampled_NV, tokens_N1, num_top))
            if not metadata.all_random:
                # Of greedy rows: the one token, as the drawn and as the likeliest one.
                greedy_N1 = torch.as_tensor(  # noqa: N806
                    metadata.temperature is None or metadata.temperature[:, None] < _GREEDY,
                    device=logits_NV.device,
                )
                alone_K = logprobs_NK.new_full((1 + num_top,), -math.inf)  # noqa: N806
                alone_K[:2] = 0.0
                greedy = tokens_N1, alone_K
                of_sampled = [
                    torch.where(greedy_N1, own, other)
                    for own, other in zip(greedy, of_sampled, strict=True)
                ]
            wants_N1 = torch.from_numpy(self.rows.sampled).to(logits_NV.device)[:, None]  # noqa: N806
            ids_NK = torch.where(wants_N1, of_sampled[0], ids_NK)  # noqa: N806
            logprobs_NK = torch.where(wants_N1, of_sampled[1], logprobs_NK)  # noqa: N806
        return LogprobsTensors(
            ids_NK.to(torch.int32), logprobs_NK, torch.zeros_like(tokens_N, dtype=torch.int32)
        )


def _with_likeliest(
    logprobs_NV: torch.Tensor,  # noqa: N803
    tokens_N1: torch.Tensor,  # noqa: N803
    num_top: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and log-probabilities [N, 1 + num_top]: of the drawn token, then the likeliest."""
    drawn_N1 = logprobs_NV.gather(1, tokens_N1)  # noqa: N806
    if not num_top:
        return tokens_N1, drawn_N1
    top = logprobs_NV.topk(num_top)
    return torch.cat([tokens_N1, top.indices], 1), torch.cat([drawn_N1, top.values], 1)

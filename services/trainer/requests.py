"""A ForwardBackward or Forward under way: what is left of it, and what it has come to.

Gradients are added up per request in the order of its own units, whatever passes they were in.
What goes wrong with one request is kept here and touches no other. Legend: T positions.
"""

# ruff: noqa: N803 - shape suffixes

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from rollmesh.errors import NonFinite
from rollmesh.types import ForwardResult
from services.trainer import losses
from services.trainer.batches import Unit, cut, pad
from services.trainer.passes import Outcome, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from rollmesh.types import Datum, FloatArray, LossConfig
    from services.trainer.batches import Chunk
    from services.trainer.lora import LoraWeights

    RunPass = Callable[[Sequence[Part]], list[Outcome]]


@dataclass(frozen=True, slots=True, eq=False)
class BatchGradients:
    """What a batch gives: gradients in the order of LoraWeights.parameters, per datum logprobs."""

    gradients: list[Tensor]
    logprobs: tuple[FloatArray, ...]
    metrics: Mapping[str, float]


class Request:
    """A batch for one adapter; with a config its loss is wanted, at the config's temperature.

    Args:
        backward: and its gradients.

    Attributes:
        error: what it failed with; the rest of it is not worth computing.
    """

    def __init__(
        self,
        weights: LoraWeights,
        data: Sequence[Datum],
        config: LossConfig | None,
        *,
        max_length: int,
        max_tokens: int,
        temperature: float | None = None,
        backward: bool = True,
    ) -> None:
        self.error: Exception | None = None
        self._weights = weights
        self._data = data
        self._config = config
        self._temperature = temperature if config is None else config.temperature
        self._backward = config is not None and backward
        lengths = [len(datum.token_ids) for datum in data]
        self._units = cut(lengths, max_length=max_length, max_tokens=max_tokens)
        self._num_taken = 0
        self._gradient: Tensor | None = None
        self._logprobs: dict[int, FloatArray] = {}
        self._base_logprobs: dict[int, FloatArray] = {}
        self._entropies: dict[int, FloatArray] = {}
        self._losses: dict[int, float] = {}

    @property
    def next_unit(self) -> Unit | None:
        """The first that no pass has taken; None: there is none."""
        if self._num_taken == len(self._units) or self.error is not None:
            return None
        return self._units[self._num_taken]

    @property
    def kind(self) -> bool:
        """Whether its passes go backward: units share a pass only with their own kind."""
        return self._backward

    def take(self) -> Unit:
        """The next unit, which the caller brings to `absorb`."""
        self._num_taken += 1
        return self._units[self._num_taken - 1]

    def part(self, unit: Unit) -> Part:
        """`unit` as a pass wants it."""
        chunk = pad(self._data, unit)
        return Part(chunk, self._weights, self._config, self._temperature, self._backward)

    def absorb(self, part: Part, outcome: Outcome, run_pass: RunPass) -> None:
        """Keep what a unit gave; units come in their order.

        Where a gradient is not finite, `run_pass` finds the datum at fault.

        Raises:
            NonFinite: a log-probability, loss or gradient; the error names the datum.
        """
        self._logprobs |= _rows(part.chunk, outcome.logprobs_BT)
        if outcome.losses_B is None:
            for index in part.chunk.indices:
                if not np.isfinite(self._logprobs[index]).all():
                    raise _non_finite(index, "log-probability")
            return
        self._keep_losses(part.chunk, outcome, outcome.losses_B.tolist())
        if outcome.gradient is None:
            return
        if not _finite(outcome.gradient):
            raise self._culprit(part.chunk, run_pass)
        if self._gradient is None:
            self._gradient = outcome.gradient
        else:
            self._gradient += outcome.gradient

    def _keep_losses(self, chunk: Chunk, outcome: Outcome, losses: Sequence[float]) -> None:
        for index, loss in zip(chunk.indices, losses, strict=True):
            if not np.isfinite(loss):
                raise _non_finite(index, "loss")
            self._losses[index] = loss
        if outcome.base_logprobs_BT is not None:
            self._base_logprobs |= _rows(chunk, outcome.base_logprobs_BT)
        if outcome.entropies_BT is not None:
            self._entropies |= _rows(chunk, outcome.entropies_BT)

    def logprobs(self) -> tuple[FloatArray, ...]:
        """Per datum the log-probability of each target, float32 [T]."""
        return tuple(self._logprobs[index] for index in range(len(self._data)))

    def result(self, times: Mapping[str, float]) -> ForwardResult:
        """What all units came to but gradients; of a loss, with `times` among the metrics."""
        if self._config is None:
            return ForwardResult(self.logprobs())
        order, base, entropies = range(len(self._data)), self._base_logprobs, self._entropies
        metrics = losses.metrics(
            self._config,
            self._data,
            losses=[self._losses[index] for index in order],
            logprobs=self.logprobs(),
            base_logprobs=[base[index] for index in order] if base else None,
            entropies=[entropies[index] for index in order] if entropies else None,
        )
        return ForwardResult(self.logprobs(), {**metrics, **times})

    def gradients(self, times: Mapping[str, float]) -> BatchGradients:
        """What all units came to, with `times` among the metrics.

        Raises:
            NonFinite: finite gradients whose sum is not.
        """
        gradient = cast("Tensor", self._gradient)
        if not _finite(gradient):
            raise _not_their_sum()
        result = self.result(times)
        parameters = self._weights.parameters()
        sizes = [parameter.numel() for parameter in parameters]
        pieces: Sequence[Tensor] = gradient.split(sizes)  # type: ignore[no-untyped-call]
        gradients = [
            piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)
        ]
        return BatchGradients(gradients, result.logprobs, result.metrics)

    def _culprit(self, chunk: Chunk, run_pass: RunPass) -> NonFinite:
        """The error that names the datum of `chunk` whose own gradient is not finite."""
        length = chunk.token_ids_BT.shape[1]
        outcomes = run_pass([self.part(Unit((index,), length)) for index in chunk.indices])
        for index, outcome in zip(chunk.indices, outcomes, strict=True):
            if outcome.gradient is not None and not _finite(outcome.gradient):
                return _non_finite(index, "gradient")
        return _not_their_sum()


def next_pass(requests: Sequence[Request], max_tokens: int) -> list[tuple[Request, Unit]]:
    """Units of one kind and length that the next pass takes, at most `max_tokens` if several.

    The first request's next unit says which kind and length. Then each request in turn gives a
    unit, as long as one fits.
    """
    leader = cast("Unit", requests[0].next_unit)
    taken: list[tuple[Request, Unit]] = []
    num_tokens = 0
    giving = [request for request in requests if request.kind == requests[0].kind]
    while giving:
        still = []
        for request in giving:
            unit = request.next_unit
            if unit is None or unit.length != leader.length:
                continue
            if taken and num_tokens + unit.num_tokens > max_tokens:
                continue
            taken.append((request, request.take()))
            num_tokens += unit.num_tokens
            still.append(request)
        giving = still
    return taken


def advance(taken: Sequence[tuple[Request, Unit]], run_pass: RunPass) -> None:
    """Run one pass over the units taken; a request that fails keeps its error.

    A pass that breaks is run again with each request by itself: only one that breaks its own pass
    fails, and the bits of the others are the same as in company.
    """
    try:
        parts = [(request, request.part(unit)) for request, unit in taken]
        outcomes = run_pass([part for _, part in parts])
    except Exception as error:  # noqa: BLE001 - raised to the caller of the request at fault
        requests = list(dict.fromkeys(request for request, _ in taken))
        if len(requests) == 1:
            requests[0].error = error
            return
        for alone in requests:
            advance([pair for pair in taken if pair[0] is alone], run_pass)
        return
    for (request, part), outcome in zip(parts, outcomes, strict=True):
        if request.error is None:
            try:
                request.absorb(part, outcome, run_pass)
            except Exception as error:  # noqa: BLE001 - as above
                request.error = error


def _rows(chunk: Chunk, values_BT: FloatArray) -> dict[int, FloatArray]:
    """The rows of `values_BT` by their place in the batch, without padding."""
    rows = zip(chunk.indices, chunk.lengths, values_BT, strict=True)
    return {index: row[:length].copy() for index, length, row in rows}


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _non_finite(index: int, what: str) -> NonFinite:
    return NonFinite(f"data[{index}]: its {what} is not finite", field=f"data[{index}]")


def _not_their_sum() -> NonFinite:
    return NonFinite("data: their gradients are finite, but not their sum", field="data")

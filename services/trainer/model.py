"""The frozen base model, and passes over it with an adapter on: the only code that runs the model.

Never any dropout: the log-probabilities of training are those of sampling.
Legend: B sequences, T positions, V vocabulary.
"""

# ruff: noqa: N803, N806 - shape suffixes

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from rollmesh.errors import InvalidRequest, NonFinite, Unavailable
from rollmesh.types import Datum, LossConfig
from services.trainer import losses
from services.trainer.batches import Chunk, chunks, pad
from services.trainer.lora import LoraLayers, LoraWeights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from rollmesh.types import FloatArray
    from services.trainer.config import TrainerConfig


@dataclass(frozen=True, slots=True, eq=False)
class BatchGradients:
    """What a batch gives: gradients in the order of LoraWeights.parameters, per datum logprobs."""

    gradients: list[Tensor]
    logprobs: tuple[FloatArray, ...]
    metrics: dict[str, float]


class Model:
    """A causal language model of transformers, frozen, with LoRA on its linear layers.

    Attributes:
        lora: its layers that adapters can change.
        vocab_size: tokens that it reads and predicts.
        max_length: positions of the longest sequence: its context, or what one pass may hold.
    """

    def __init__(self, module: Any, *, max_batch_tokens: int) -> None:
        self._module: nn.Module = module.eval().requires_grad_(requires_grad=False)
        self._device: torch.device = module.device
        self._max_batch_tokens = max_batch_tokens
        self._stopped = threading.Event()
        config = module.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.max_length: int = min(config.max_position_embeddings, max_batch_tokens)
        self.lora = LoraLayers(module, module.get_output_embeddings())

    def stop(self) -> None:
        """Let a batch under way fail with Unavailable before its next pass, and all later ones."""
        self._stopped.set()

    def forward(self, weights: LoraWeights, data: Sequence[Datum]) -> tuple[FloatArray, ...]:
        """Per datum the log-probability of each target, float32 [T].

        Raises:
            NonFinite: one that is not finite; the error names the datum.
        """
        logprobs: dict[int, FloatArray] = {}
        for chunk in chunks(data, self._max_batch_tokens):
            logprobs_BT = self._logprobs(chunk, weights)
            _check_finite(chunk, logprobs_BT.sum(dim=1), "log-probability")
            logprobs |= _rows(chunk, logprobs_BT)
        return tuple(logprobs[index] for index in range(len(data)))

    def forward_backward(
        self, weights: LoraWeights, data: Sequence[Datum], config: LossConfig
    ) -> BatchGradients:
        """Gradients of the summed loss of `data`.

        Raises:
            NonFinite: a loss or a gradient; the error names the datum.
        """
        gradients = [torch.zeros_like(parameter) for parameter in weights.parameters()]
        logprobs: dict[int, FloatArray] = {}
        base_logprobs: dict[int, FloatArray] = {}
        found_losses: dict[int, float] = {}
        for chunk in chunks(data, self._max_batch_tokens):
            base_BT = None if config.kl_coefficient is None else self._logprobs(chunk, None)
            logprobs_BT, losses_B, parts = self._pass(chunk, weights, config, base_BT)
            if not _all_finite(parts):
                raise self._culprit(data, chunk, weights, config)
            gradients = [old + new for old, new in zip(gradients, parts, strict=True)]
            logprobs |= _rows(chunk, logprobs_BT)
            base_logprobs |= {} if base_BT is None else _rows(chunk, base_BT)
            found_losses |= dict(zip(chunk.indices, losses_B.tolist(), strict=True))
        order = range(len(data))
        result = tuple(logprobs[index] for index in order)
        metrics = losses.metrics(
            config,
            data,
            losses=[found_losses[index] for index in order],
            logprobs=result,
            base_logprobs=[base_logprobs[index] for index in order] if base_logprobs else None,
        )
        return BatchGradients(gradients, result, metrics)

    def _pass(
        self, chunk: Chunk, weights: LoraWeights, config: LossConfig, base_BT: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Log-probabilities [B, T], losses [B] and the gradients of their sum."""
        with torch.enable_grad():
            logprobs_BT = self._logprobs_with_gradient(chunk, weights)
            losses_B = losses.losses(
                config,
                logprobs_BT,
                weights_BT=self._tensor(chunk.weights_BT),
                sampling_logprobs_BT=self._tensor(chunk.sampling_logprobs_BT),
                advantages_BT=self._tensor(chunk.advantages_BT),
                base_logprobs_BT=base_BT,
            )
            _check_finite(chunk, losses_B.detach(), "loss")
            # A model may hold linear layers that a pass does not reach.
            gradients = torch.autograd.grad(
                losses_B.sum(), weights.parameters(), allow_unused=True, materialize_grads=True
            )
        return logprobs_BT.detach(), losses_B.detach(), gradients

    @torch.no_grad()
    def _logprobs(self, chunk: Chunk, weights: LoraWeights | None) -> Tensor:
        """Log-probability of each target, float32 [B, T]; without weights the base model's."""
        return self._logprobs_with_gradient(chunk, weights)

    def _logprobs_with_gradient(self, chunk: Chunk, weights: LoraWeights | None) -> Tensor:
        if self._stopped.is_set():
            raise Unavailable("the trainer is going away")
        with self.lora.active(weights):
            # No attention mask: padding is on the right, where a causal model never looks.
            output = self._module(input_ids=self._tensor(chunk.token_ids_BT), use_cache=False)
        logits_BTV: Tensor = output.logits
        targets = self._tensor(chunk.target_token_ids_BT).long()
        rows = logits_BTV.float().flatten(0, 1)
        return -cross_entropy(rows, targets.flatten(), reduction="none").view_as(targets)

    def _culprit(
        self, data: Sequence[Datum], chunk: Chunk, weights: LoraWeights, config: LossConfig
    ) -> NonFinite:
        """The error that names the datum of `chunk` whose gradient is not finite."""
        for index in chunk.indices:
            alone = pad(data, [index])
            base_BT = None if config.kl_coefficient is None else self._logprobs(alone, None)
            if not _all_finite(self._pass(alone, weights, config, base_BT)[2]):
                return _non_finite(index, "gradient")
        return NonFinite("data: their gradients are finite, but not their sum", field="data")

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def load(config: TrainerConfig) -> Model:
    """The base model that `config` names, after a pass over one token that shows that it works.

    Raises:
        InvalidRequest: it cannot be loaded, or has no linear layers.
    """
    torch.set_num_threads(config.num_threads)
    # An op without a deterministic form on a GPU warns there; CPU ones all have one.
    torch.use_deterministic_algorithms(mode=True, warn_only=config.device != "cpu")
    # Tensors are never read before they are written, so filling them first only costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    disable_progress_bar()  # The log is one JSON object a line.
    path = config.base_model.source
    try:
        module = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"base_model.path: cannot load {path!r}: {str(error).splitlines()[0]}",
            field="base_model.path",
            value=path,
        ) from error
    model = Model(module.to(config.device), max_batch_tokens=config.max_batch_tokens)
    if not model.lora.target_modules:
        raise InvalidRequest(
            f"base_model.path: {path!r} has no linear layers", field="base_model.path"
        )
    token = np.zeros(1, np.int32)
    weights = model.lora.fresh(rank=1, alpha=1.0, target_modules=model.lora.target_modules, seed=0)
    model.forward_backward(weights, [Datum(token, token)], LossConfig("cross_entropy"))
    return model


def _rows(chunk: Chunk, values_BT: Tensor) -> dict[int, FloatArray]:
    """The rows of `values_BT` by their place in the batch, without padding."""
    values = values_BT.cpu().numpy()
    rows = zip(chunk.indices, chunk.lengths, values, strict=True)
    return {index: row[:length].copy() for index, length, row in rows}


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _check_finite(chunk: Chunk, values_B: Tensor, what: str) -> None:
    finite = torch.isfinite(values_B)
    if not finite.all():
        raise _non_finite(chunk.indices[int(finite.int().argmin())], what)


def _non_finite(index: int, what: str) -> NonFinite:
    return NonFinite(f"data[{index}]: its {what} is not finite", field=f"data[{index}]")

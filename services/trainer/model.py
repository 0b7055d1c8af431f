"""The frozen base model with LoRA on its linear layers: the only code that runs the model.

Never any dropout: the log-probabilities of training are those of sampling.
Legend: P sequences of a pass, T positions, V vocabulary.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from rollmesh.errors import InvalidRequest, Unavailable
from rollmesh.types import Datum, LossConfig
from services.trainer.batches import UNIT_TOKENS, whole_length
from services.trainer.lora import LoraLayers, LoraWeights, Rows
from services.trainer.passes import Outcome, Part, run_pass
from services.trainer.requests import BatchGradients, Request, advance, next_pass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from rollmesh.types import FloatArray
    from services.trainer.config import TrainerConfig


class Model:
    """A causal language model of transformers, frozen, with LoRA on its linear layers.

    Attributes:
        lora: its layers that adapters can change.
        vocab_size: tokens that it reads and predicts.
        max_length: positions of the longest sequence: its context, rounded down to a length that
            units have, or what one pass may hold.
        max_batch_tokens: tokens of a pass, padding included; one unit may be a little more, its
            length being rounded up.
    """

    def __init__(self, module: Any, *, max_batch_tokens: int) -> None:
        self._module: nn.Module = module.eval().requires_grad_(requires_grad=False)
        self._device: torch.device = module.device
        self._stopped = threading.Event()
        config = module.config.get_text_config()
        self._context = whole_length(config.max_position_embeddings)
        self.vocab_size: int = config.vocab_size
        self.max_length: int = min(self._context, max_batch_tokens)
        self.max_batch_tokens = max_batch_tokens
        self.lora = LoraLayers(module, module.get_output_embeddings())

    def stop(self) -> None:
        """Let what is under way fail with Unavailable before its next pass, and all later ones."""
        self._stopped.set()

    def request(
        self,
        weights: LoraWeights,
        data: Sequence[Datum],
        config: LossConfig | None,
        temperature: float | None = None,
        *,
        backward: bool = True,
    ) -> Request:
        """A ForwardBackward of `data`, or not `backward` or without a config a Forward, cut to fit.

        `temperature` is that of a Forward without a config.
        """
        return Request(
            weights,
            data,
            config,
            max_length=self._context,
            max_tokens=min(UNIT_TOKENS, self.max_batch_tokens),
            temperature=temperature,
            backward=backward,
        )

    def run_pass(self, parts: Sequence[Part]) -> list[Outcome]:
        """See passes.run_pass.

        Raises:
            Unavailable: the model was stopped.
        """
        if self._stopped.is_set():
            raise Unavailable("the trainer is going away")
        return run_pass(self._logits, parts, self._device)

    def forward(
        self, weights: LoraWeights, data: Sequence[Datum], temperature: float | None = None
    ) -> tuple[FloatArray, ...]:
        """Per datum the log-probability of each target, float32 [T], alone.

        Raises:
            NonFinite: one that is not finite; the error names the datum.
        """
        return self._alone(self.request(weights, data, None, temperature)).logprobs()

    def forward_backward(
        self, weights: LoraWeights, data: Sequence[Datum], config: LossConfig
    ) -> BatchGradients:
        """Gradients of the summed loss of `data`, alone.

        Raises:
            NonFinite: a loss or a gradient; the error names the datum.
        """
        return self._alone(self.request(weights, data, config)).gradients({})

    def _alone(self, request: Request) -> Request:
        while request.next_unit is not None:
            advance(next_pass([request], self.max_batch_tokens), self.run_pass)
        if request.error is not None:
            raise request.error
        return request

    def _logits(self, token_ids_PT: Tensor, rows: Sequence[Rows]) -> Tensor:  # noqa: N803
        """Logits [P, T, V], with each adapter on its rows."""
        with self.lora.active(rows):
            # No attention mask: padding is on the right, where a causal model never looks.
            logits: Tensor = self._module(input_ids=token_ids_PT, use_cache=False).logits
        return logits


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

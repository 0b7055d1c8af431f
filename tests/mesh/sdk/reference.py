"""The same arithmetic by torch, transformers and peft alone: what the mesh has to agree with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[Any]]


class Reference:
    """A base model in float32, with an adapter that was exported."""

    def __init__(self, folder: str) -> None:
        transformers.logging.disable_progress_bar()
        self._loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logprobs(
        self,
        tokens: Sequence[int],
        targets: Sequence[int],
        adapter: tuple[dict[str, Any], Tensors] | None = None,
    ) -> NDArray[np.float32]:
        """Of each target at its position, without gradients."""
        model = self._base() if adapter is None else self._adapted(*adapter)
        with torch.no_grad():
            return _logprobs(model, tokens, targets).numpy()

    def distributions(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities [N, vocabulary] of what follows each token, of the base model."""
        with torch.no_grad():
            logits = self._base()(torch.tensor([list(tokens)])).logits[0]
            return torch.log_softmax(logits, -1).numpy()

    def stepped(
        self,
        adapter: tuple[dict[str, Any], Tensors],
        data: Sequence[tuple[Sequence[int], Sequence[int]]],
        loss: Callable[[list[torch.Tensor]], torch.Tensor],
        *,
        max_grad_norm: float = 0.0,
        **adam: Any,
    ) -> tuple[float, dict[str, NDArray[Any]]]:
        """The loss, and the adapter's tensors after one step of torch's AdamW from it."""
        model = self._adapted(*adapter)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, **adam)
        value = loss([_logprobs(model, tokens, targets) for tokens, targets in data])
        value.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        return float(value.detach()), {
            name: tensor.detach().numpy().copy()
            for name, tensor in get_peft_model_state_dict(model).items()
        }

    def _base(self) -> Any:
        """A copy: peft changes what it is given."""
        return copy.deepcopy(self._loaded)

    def _adapted(self, config: dict[str, Any], tensors: Tensors) -> Any:
        lora = LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            target_modules=config["target_modules"],
            lora_dropout=0.0,
        )
        model = get_peft_model(self._base(), lora)
        loaded = set_peft_model_state_dict(
            model, {name: torch.tensor(np.array(value)) for name, value in tensors.items()}
        )
        assert not loaded.unexpected_keys, loaded.unexpected_keys
        assert not [name for name in loaded.missing_keys if "lora_" in name], loaded.missing_keys
        return model


def _logprobs(model: Any, tokens: Sequence[int], targets: Sequence[int]) -> torch.Tensor:
    logits = model(torch.tensor([list(tokens)])).logits[0]
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(list(targets))[:, None])
    return chosen[:, 0]

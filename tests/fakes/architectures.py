"""Random models of a few thousand parameters in every architecture that the trainer is tried on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 40
MAX_LENGTH = 64
WINDOW = 5

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED_QUERIES = {"num_key_value_heads": 2}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of models: the settings of a tiny one, and what its layers are called."""

    config: type[PretrainedConfig]
    settings: dict[str, Any]
    attention: tuple[str, ...] = _PROJECTIONS
    mlp: tuple[str, ...] = _GATED_MLP
    unembedding: str = "lm_head"

    @property
    def targets(self) -> dict[str, tuple[str, ...]]:
        """Sets of target modules worth trying, by what they are."""
        layers = self.attention + self.mlp
        return {
            "attention": self.attention,
            "mlp": self.mlp,
            "all-linear": layers,
            "unembedding": (self.unembedding,),
            "all-linear and unembedding": (*layers, self.unembedding),
        }

    def build(self, *, tied: bool) -> PreTrainedModel:
        """The same weights every time, no two layers or channels alike."""
        config = self.config(**{**_COMMON, **self.settings, "tie_word_embeddings": tied})
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():
                if parameter.dim() == 1:  # Biases begin as zeros, and the gains of norms are equal.
                    parameter.data += 0.2 * torch.randn(parameter.shape)
        return model


ARCHITECTURES = {
    "llama": Architecture(LlamaConfig, _GROUPED_QUERIES),
    "qwen2": Architecture(Qwen2Config, _GROUPED_QUERIES),
    # The second layer alone looks through a window; heads are not hidden_size / number of heads.
    "qwen3": Architecture(
        Qwen3Config,
        {
            **_GROUPED_QUERIES,
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "gemma": Architecture(GemmaConfig, {"num_key_value_heads": 1, "head_dim": 8}),
    "mistral": Architecture(MistralConfig, {**_GROUPED_QUERIES, "sliding_window": WINDOW}),
    "phi": Architecture(
        PhiConfig, {}, attention=("q_proj", "k_proj", "v_proj", "dense"), mlp=("fc1", "fc2")
    ),
    "gpt_neox": Architecture(
        GPTNeoXConfig,
        {},
        attention=("query_key_value", "dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
    ),
    # Its layers' outputs are changed in place.
    "falcon": Architecture(
        FalconConfig,
        {"ffn_hidden_size": 24},
        attention=("query_key_value", "dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
    ),
    # The gradients of its layers come as views, whose strides depend on the number of sequences.
    "gpt_neo": Architecture(
        GPTNeoConfig,
        {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("c_fc", "c_proj"),
    ),
}

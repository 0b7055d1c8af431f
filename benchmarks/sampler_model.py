"""The model and the adapters that benchmarks/sampler.py samples from: random, made on the spot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 2048
HIDDEN = 128
MLP = 384
LAYERS = 14
HEADS = 4
KV_HEADS = 2
HEAD = 32
POSITIONS = 512
RANK = 16
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
"""Of every linear layer: output size, input size."""


def make_model(folder: Path) -> None:
    """A random Qwen3 of 3.0 million parameters with a word for every id."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    words = {f"<{index}>": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<3>")),  # noqa: S106 - a word
        bos_token="<0>",  # noqa: S106
        eos_token="<1>",  # noqa: S106
        pad_token="<2>",  # noqa: S106
        unk_token="<3>",  # noqa: S106
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
    tokenizer.save_pretrained(folder)


def make_adapter(folder: Path, seed: int) -> Path:
    """A random adapter of rank 16 on all linear layers, in PEFT's format."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        for module, (size_out, size_in) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for half, shape in (("A", (RANK, size_in)), ("B", (size_out, RANK))):
                tensors[f"{name}.lora_{half}.weight"] = rng.normal(0, 0.02, shape).astype("f4")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [module.rpartition(".")[2] for module in SHAPES],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

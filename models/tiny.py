"""The tiny models' common shape: a Qwen3 of four layers, and one token for each character."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD, UNK = "<|begin|>", "<|end|>", "<|pad|>", "<|unknown|>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n\t"
POSITIONS = 512


def make_tokenizer(
    roles: Sequence[str], chat_template: str, words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """One token per character of printable ASCII, `words` whole, and the chat template's own.

    `roles` are the template's special tokens for who speaks.
    """
    names = [PAD, BOS, EOS, UNK, *roles, *CHARACTERS]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens=list(roles),
        chat_template=chat_template,
        model_max_length=POSITIONS,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """An untrained model whose vocabulary is exactly the tokenizer's."""
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model

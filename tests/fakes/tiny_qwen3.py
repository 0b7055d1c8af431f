"""A random Qwen3 of a few thousand parameters, and batches for it."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollmesh.blobs import Blobs
from rollmesh.types import Datum
from services.trainer.adapters import Adapters
from services.trainer.engine import Engine
from services.trainer.exports import Exports
from services.trainer.model import Model
from services.trainer.snapshots import Snapshots
from services.trainer.uninterrupted import Uninterrupted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

VOCAB_SIZE = 24
MAX_LENGTH = 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_qwen3(**changes) -> Qwen3ForCausalLM:
    """The same weights every time, large enough that gradients are far from rounding."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        **changes,
    }
    config = Qwen3Config(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Qwen3ForCausalLM(config).eval()


def tiny_model(max_batch_tokens: int = 256) -> Model:
    torch.set_num_threads(1)  # the machine is shared, and bits depend on it
    return Model(tiny_qwen3(), max_batch_tokens=max_batch_tokens)


@contextlib.asynccontextmanager
async def tiny_adapters(
    model: Model | None = None, blobs: str | Blobs = "memory://tiny", **changes
) -> AsyncIterator[Adapters]:
    """Adapters on a model, with all that they need to run, while the block lasts."""
    model = model or tiny_model()
    store = Blobs(blobs) if isinstance(blobs, str) else blobs
    settings = {
        "base_model": "tiny",
        "max_rank": 8,
        "max_adapters": 3,
        "max_adapter_bytes": 2**30,
        "kept_versions": 2,
        "max_queued_ops": 8,
        "instance_id": "this-one",
        **changes,
    }
    with contextlib.ExitStack() as stack:
        engine = Engine(model, max_queued_ops=settings["max_queued_ops"])
        stack.callback(engine.close)
        snapshots = Snapshots(
            store,
            model.lora,
            base_model=settings["base_model"],
            new_id=lambda: uuid.uuid4().hex,
            max_queued=settings["max_queued_ops"],
        )
        stack.callback(snapshots.close)
        exports = Exports(store, new_id=lambda: uuid.uuid4().hex)
        async with contextlib.AsyncExitStack() as ending:
            uninterrupted = await ending.enter_async_context(Uninterrupted())
            ending.push_async_callback(exports.close, 60.0)
            yield Adapters(model, engine, snapshots, exports, uninterrupted, **settings)


def batch(lengths, *, seed: int = 0, sampled: bool = True) -> list[Datum]:
    """Random data; the first third of each is masked, as prompts are."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = rng.integers(0, VOCAB_SIZE, length + 1).astype(np.int32)
        weights = rng.uniform(0.5, 1.5, length).astype(np.float32)
        weights[: length // 3] = 0
        data.append(
            Datum(
                token_ids=tokens[:-1],
                target_token_ids=tokens[1:],
                weights=weights,
                sampling_logprobs=rng.uniform(-6, -1, length).astype(np.float32)
                if sampled
                else None,
                advantages=rng.normal(size=length).astype(np.float32) if sampled else None,
            )
        )
    return data

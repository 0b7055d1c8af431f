"""Policies whose every token tells which of them drew it.

A tiny Qwen3 whose base model only ever draws token 0, and adapters that each draw one token of
their own. What an adapter adds goes through the keys and values: its v_proj writes a code of its
own into each position, its o_proj answers that code with its token. So weights of another version,
a half of them, and keys and values that another version wrote all give another token.

Shapes: the residual stream is HIDDEN wide; its coordinate 0 is constant and large everywhere, which
is what a linear adapter can take for 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rollmesh import convert
from rollmesh.api.common.v1 import export_pb2
from rollmesh.api.trainer.v1 import trainer_service_pb2 as pb
from rollmesh.api.trainer.v1.trainer_service_pb2_grpc import (
    TrainerServiceServicer,
    add_TrainerServiceServicer_to_server,
)
from rollmesh.digest import safetensors_digest
from rollmesh.rpc.server import serving
from rollmesh.types import AdapterExport, AdapterSource

if TYPE_CHECKING:
    from pathlib import Path

BASE_MODEL = "oracle"
BASE_TOKEN = 0
NUM_ADAPTERS = 64
NUM_TOKENS = 8
"""Tokens of each adapter: version n draws the adapter's token n mod NUM_TOKENS."""
VOCABULARY = 1 + NUM_ADAPTERS * NUM_TOKENS
HIDDEN = 64
HEAD = 32
CONSTANT = 8.0
STRENGTH = 2.0
RANK = 8
MAX_LENGTH = 512


def adapter_name(index: int) -> str:
    """Of two tenants by turns."""
    return f"projects/{'red' if index % 2 else 'blue'}/adapters/a{index}"


def token_of(index: int, version: int) -> int:
    """What an adapter draws at a version: none of its last NUM_TOKENS versions, nor any other of
    NUM_ADAPTERS adapters, draws the same.
    """
    return 1 + index % NUM_ADAPTERS * NUM_TOKENS + version % NUM_TOKENS


@lru_cache(maxsize=1)
def _directions() -> np.ndarray:
    """A direction of the residual stream for each token; all without its coordinate 0."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    vectors[:, 0] = 0.0
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@lru_cache(maxsize=1)
def _codes() -> np.ndarray:
    """What the adapter of each token writes into the values: a direction of one head."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((VOCABULARY, HEAD)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_model(folder: Path) -> None:
    """The base model and a tokenizer of VOCABULARY words."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    text = Tokenizer(models.WordLevel(words, "w0"))
    text.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=text).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=HEAD,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.02,
        )
        model = Qwen3ForCausalLM(config)
        layer = model.model.layers[0]
        with torch.no_grad():
            for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.zero_()
            model.model.embed_tokens.weight[:, 0] = CONSTANT
            model.lm_head.weight.copy_(torch.from_numpy(_directions()) * CONSTANT)
            model.lm_head.weight[BASE_TOKEN] = 0.0
            model.lm_head.weight[BASE_TOKEN, 0] = CONSTANT
        model.save_pretrained(folder)


@lru_cache(maxsize=4096)
def export_of(index: int, version: int) -> tuple[AdapterExport, bytes, str]:
    """Header, adapter_model.safetensors and digest of a version."""
    token = token_of(index, version)
    prefix = "base_model.model.model.layers.0.self_attn"
    v_a = np.zeros((RANK, HIDDEN), np.float32)
    v_b = np.zeros((2 * HEAD, RANK), np.float32)
    o_a = np.zeros((RANK, 2 * HEAD), np.float32)
    o_b = np.zeros((HIDDEN, RANK), np.float32)
    row = version % RANK
    # The layer's norm has brought the constant to sqrt(HIDDEN): undo that.
    v_a[row, 0] = HIDDEN**-0.5
    v_b[:HEAD, row] = _codes()[token]
    o_a[row, :HEAD] = _codes()[token]
    o_b[:, row] = _directions()[token] * CONSTANT * STRENGTH
    # Tells versions of the same token apart: no two versions have the same tensors.
    v_a[(row + 1) % RANK, 1] = float(version)
    file = save(
        {
            f"{prefix}.v_proj.lora_A.weight": v_a,
            f"{prefix}.v_proj.lora_B.weight": v_b,
            f"{prefix}.o_proj.lora_A.weight": o_a,
            f"{prefix}.o_proj.lora_B.weight": o_b,
        },
        metadata={"format": "pt"},
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["o_proj", "v_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    header = AdapterExport(adapter_name(index), version, BASE_MODEL, json.dumps(config), len(file))
    return header, file, safetensors_digest(file)


def index_of(adapter: str) -> int:
    """The adapter's number, from its name."""
    return int(adapter.rpartition("/a")[2])


@dataclass
class OracleTrainer(TrainerServiceServicer):
    """Exports every version of every adapter; `faults` are used up by the next transfers."""

    faults: list[str] = field(default_factory=list)
    address: str = ""
    num_pulls: int = 0
    lifetimes: dict[int, int] = field(default_factory=dict)
    """How often an adapter was deleted and made again: each life begins with other tensors."""

    def version_in_file(self, index: int, version: int) -> int:
        """Which tensors an adapter's version has in its present life."""
        return version + 3 * self.lifetimes.get(index, 0)

    def source(self, index: int, version: int) -> AdapterSource:
        """As the coordinator would say it."""
        digest = export_of(index, self.version_in_file(index, version))[2]
        return AdapterSource(adapter_name(index), version, digest, self.address)

    def token(self, index: int, version: int) -> int:
        """What it draws."""
        return token_of(index, self.version_in_file(index, version))

    async def ExportAdapter(self, request, context):
        self.num_pulls += 1
        index, version = index_of(request.name), request.policy_version
        header, data, digest = export_of(index, self.version_in_file(index, version))
        header = replace(header, policy_version=version)
        fault = self.faults.pop() if self.faults else ""
        if fault == "corrupted":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        if fault == "other version":
            _, data, _ = export_of(index, self.version_in_file(index, version + 1))
        yield pb.ExportAdapterResponse(header=convert.export_header_to_pb(header))
        for start in range(request.offset, len(data), 2000):
            if fault == "torn" and start > len(data) // 2:
                return
            if fault == "slow":
                await asyncio.sleep(0.05)
            yield pb.ExportAdapterResponse(chunk=data[start : start + 2000])
        yield pb.ExportAdapterResponse(trailer=export_pb2.AdapterExportTrailer(digest=digest))


@contextlib.asynccontextmanager
async def oracle_trainer():
    """An OracleTrainer behind real gRPC."""
    trainer = OracleTrainer()
    async with serving(
        lambda server: add_TrainerServiceServicer_to_server(trainer, server), services=[]
    ) as running:
        trainer.address = f"127.0.0.1:{running.port}"
        yield trainer

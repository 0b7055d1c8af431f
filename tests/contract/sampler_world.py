"""What the sampler's tests sample from: a tiny random Qwen3, adapters of it, and their trainer."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rollmesh import convert
from rollmesh.api.common.v1 import export_pb2
from rollmesh.api.trainer.v1 import trainer_service_pb2 as pb
from rollmesh.api.trainer.v1.trainer_service_pb2_grpc import (
    TrainerServiceServicer,
    add_TrainerServiceServicer_to_server,
)
from rollmesh.digest import safetensors_digest
from rollmesh.errors import NotFound
from rollmesh.rpc.server import serving
from rollmesh.types import AdapterExport, AdapterSource, Datum
from services.trainer.export import parameter_names
from services.trainer.model import Model

if TYPE_CHECKING:
    from pathlib import Path

BASE_MODEL = "tiny"
ADAPTER = "projects/p/adapters/a"
NUM_VERSIONS = 6
EOS = 1
VOCABULARY = ["<pad>", "<eos>", *"0123456789+-=? abcdefghijklmnopqrstuvwxyz", *'{}[]":,.']
MAX_LENGTH = 512


def make_world(folder: Path) -> World:
    """A model folder, and PEFT folders of random adapters, one for each version."""
    text = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, "?"))
    text.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    text.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=text, **special).save_pretrained(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            eos_token_id=EOS,
            bos_token_id=None,
            pad_token_id=0,
            initializer_range=0.15,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / "model")
        for version in range(NUM_VERSIONS):
            adapted = get_peft_model(
                Qwen3ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
                # Other ranks beside each other, and other targets.
                LoraConfig(
                    r=4 + version,
                    lora_alpha=16,
                    target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"][
                        version % 2 :
                    ],
                ),
            )
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            adapted.save_pretrained(folder / str(version))
    return World(folder)


@dataclass(frozen=True)
class World:
    """The folders, and what transformers computes from them. `version` None: the base model."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @cache  # noqa: B019 - one world a session
    def policy(self, version: int | None):
        base = Qwen3ForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        if version is None:
            return base.eval()
        return PeftModel.from_pretrained(base, self.folder / str(version)).eval()

    @torch.no_grad()
    def logprobs(self, version: int | None, token_ids: list[int]) -> torch.Tensor:
        """Log-softmax after each token, [T, V]."""
        logits = self.policy(version)(input_ids=torch.tensor([token_ids])).logits[0]
        return logits.float().log_softmax(-1)

    def completion_logprobs(self, version, prompt, completion) -> list[float]:
        rows = self.logprobs(version, [*prompt, *completion])[len(prompt) - 1 : -1]
        return [row[token].item() for row, token in zip(rows, completion, strict=True)]

    def greedy(self, version: int | None, prompt: list[int], max_tokens: int) -> list[int]:
        """Without a cache and without our code; goes on after the end of sequence."""
        token_ids = list(prompt)
        for _ in range(max_tokens):
            token_ids.append(int(self.logprobs(version, token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]

    @cache  # noqa: B019
    def export(self, version: int) -> tuple[AdapterExport, bytes, str]:
        data = (self.folder / str(version) / "adapter_model.safetensors").read_bytes()
        config = (self.folder / str(version) / "adapter_config.json").read_text()
        header = AdapterExport(ADAPTER, version, BASE_MODEL, config, len(data))
        return header, data, safetensors_digest(data)


SPOILT_HEADERS = {
    "other base model": lambda _: {"base_model": "other"},
    "other version": lambda header: {"policy_version": header.policy_version + 1},
    "large rank": lambda header: {
        "adapter_config_json": header.adapter_config_json.replace('"r": ', '"r": 99')
    },
    "not PEFT": lambda _: {"adapter_config_json": "[]"},
}
"""What some faults change in a header."""


class FakeTrainer(TrainerServiceServicer):
    """Exports the world's adapters; `faults` spoil the transfers of a version.

    Attributes:
        pulls: the versions that were asked for from their first byte on.
        released: what transfers with the fault "held" wait for.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.faults: dict[int, str] = {}
        self.pulls: list[int] = []
        self.released = asyncio.Event()
        self.address = ""

    def source(self, version: int, **changes: object) -> AdapterSource:
        digest = self._world.export(version)[2]
        return replace(AdapterSource(ADAPTER, version, digest, self.address), **changes)

    async def ExportAdapter(self, request, context):
        if not request.offset:
            self.pulls.append(request.policy_version)
        if not 0 <= request.policy_version < NUM_VERSIONS:
            raise NotFound("no such version", resource=request.name)
        header, data, digest = self._world.export(request.policy_version)
        fault = self.faults.get(request.policy_version, "")
        header = replace(header, **SPOILT_HEADERS.get(fault, lambda _: {})(header))
        if fault == "flipped bit":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "other trailer":
            digest = "0" * 64
        yield pb.ExportAdapterResponse(header=convert.export_header_to_pb(header))
        if fault == "held":
            await self.released.wait()
        for start in range(request.offset, len(data) + 1000, 1000):
            if fault == "torn" and start > len(data) // 2:
                return
            if start >= len(data) - (1000 if fault == "short" else 0):
                break
            yield pb.ExportAdapterResponse(chunk=data[start : start + 1000])
        if fault == "long":
            yield pb.ExportAdapterResponse(chunk=b"more")
        yield pb.ExportAdapterResponse(trailer=export_pb2.AdapterExportTrailer(digest=digest))


@contextlib.asynccontextmanager
async def fake_trainer(world: World):
    trainer = FakeTrainer(world)
    async with serving(
        lambda server: add_TrainerServiceServicer_to_server(trainer, server), services=[]
    ) as running:
        trainer.address = f"127.0.0.1:{running.port}"
        yield trainer


def trainer_logprobs(world: World, version: int, prompt, completion, dtype: str) -> list[float]:
    """Of `completion`'s tokens, by the trainer's own model with the adapter's factors in it."""
    torch.set_num_threads(1)  # the machine is shared
    model = Model(
        Qwen3ForCausalLM.from_pretrained(world.model, dtype=getattr(torch, dtype)),
        max_batch_tokens=MAX_LENGTH,
    )
    folder = world.folder / str(version)
    config = PeftConfig.from_pretrained(folder)
    fresh = model.lora.fresh(
        rank=config.r,
        alpha=float(config.lora_alpha),
        target_modules=sorted(config.target_modules),
        seed=0,
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = fresh.replaced([tensors[name] for name in parameter_names(fresh)])
    tokens = np.array([*prompt, *completion], np.int32)
    [logprobs] = model.forward(weights, [Datum(tokens[:-1], tokens[1:])])
    return logprobs[len(prompt) - 1 :].tolist()

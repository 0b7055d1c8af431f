"""A published version is a PEFT folder that peft itself loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rollmesh.digest import safetensors_digest
from rollmesh.errors import InvalidRequest
from rollmesh.types import AdamConfig, LoraConfig, LossConfig
from tests.fakes.tiny_qwen3 import batch, tiny_adapters, tiny_qwen3

A = "projects/p/adapters/a"


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(4), LoraConfig(3, alpha=4.5, target_modules=("v_proj", "up_proj"), seed=9)],
    ids=["all layers", "two"],
)
async def test_peft_loads_an_exported_version_and_gives_its_logprobs(tmp_path, lora):
    data = batch((9, 5))
    async with tiny_adapters() as adapters:
        await adapters.create(A, lora, epoch=1)
        adapter = adapters.get(A)
        for step in range(3):
            loss = LossConfig("importance_sampling")
            await adapter.forward_backward(1, 2 * step + 1, data, loss)
            await adapter.optim_step(1, 2 * step + 2, AdamConfig(1e-2))
        published = await adapter.publish(1)
        expected_logprobs = (await adapter.forward(data)).logprobs
        version = adapters.version(A, published.policy_version)
    assert safetensors_digest(version.file) == version.digest == published.digest
    assert version.header.num_bytes == len(version.file)
    (tmp_path / "adapter_model.safetensors").write_bytes(version.file)
    (tmp_path / "adapter_config.json").write_text(version.header.adapter_config_json)

    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    model = PeftModel.from_pretrained(tiny_qwen3(), tmp_path).eval()
    for datum, expected in zip(data, expected_logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(datum.token_ids[None].astype(np.int64))).logits[0]
        rows = torch.arange(len(expected))
        found = torch.log_softmax(logits, -1)[rows, torch.tensor(datum.target_token_ids).long()]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


async def test_the_configuration_says_what_the_adapter_is():
    async with tiny_adapters() as adapters:
        lora = LoraConfig(4, target_modules=("v_proj", "q_proj"))
        await adapters.create(A, lora, epoch=1)
        await adapters.get(A).publish(1)
        config = json.loads(adapters.version(A, 0).header.adapter_config_json)
    assert {key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha")} == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8.0,
    }
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["bias"], config["lora_dropout"]) == ("none", 0.0)
    assert config["base_model_name_or_path"] == "tiny"


async def test_a_file_is_cut_into_chunks_that_make_up_all_of_it_or_the_rest():
    async with tiny_adapters() as adapters:
        await adapters.create(A, LoraConfig(2), epoch=1)
        await adapters.get(A).publish(1)
        version = adapters.version(A, 0)
    size = len(version.file)
    for offset in (0, 1, 999, 1000, size - 1, size):
        chunks = list(version.chunks(1000, offset=offset))
        assert b"".join(chunks) == version.file[offset:]
        assert all(0 < len(chunk) <= 1000 for chunk in chunks)
    for offset in (-1, size + 1, 2**63 - 1):
        with pytest.raises(InvalidRequest) as caught:
            version.chunks(1000, offset=offset)
        assert caught.value.context["field"] == "offset"

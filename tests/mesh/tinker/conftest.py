"""One mesh with a gateway for the programs of this folder, which speak to it through the SDK."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_asyncio
import yaml

from rollmesh.client import Client
from services.local.config import LocalConfig
from services.local.mesh import mesh as running_mesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "arith"
TIMEOUT_S = 280.0


@dataclass(frozen=True)
class Tinker:
    """A gateway's URL and a key, as programs are told them."""

    url: str
    key: str

    async def run(self, folder: Path, *arguments: str) -> str:
        """What a Python program prints, which must succeed; it runs in `folder`, without a hub."""
        # The recipes take a folder here for the name of a model, which is the mesh's name too.
        (folder / "arith").symlink_to(MODEL)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=folder,
            env={
                **os.environ,
                "TINKER_BASE_URL": self.url,
                "TINKER_API_KEY": self.key,
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        text = output.decode(errors="replace")
        assert process.returncode == 0, text[-4000:]
        return text


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tinker(tmp_path_factory) -> AsyncIterator[Tinker]:
    """The mesh of examples/tinker/local.yaml, with the engine that starts soonest."""
    values = yaml.safe_load((ROOT / "examples" / "tinker" / "local.yaml").read_text())
    (sampler,) = values["samplers"]
    sampler["backend"] = "transformers"
    sampler.pop("kv_cache_memory")
    values["gateway"] = {
        "base_models": [{"name": "arith", "tokenizer": str(MODEL)}],
        "drain_s": 1.0,
    }
    config = LocalConfig.parse(values, source="examples/tinker/local.yaml")
    async with running_mesh(config, tmp_path_factory.mktemp("tinker")) as mesh:
        async with Client(mesh.address) as client:
            _, secret = await client.keys.create("projects/tinker")
        assert mesh.gateway_url is not None
        yield Tinker(mesh.gateway_url, secret)

"""A client that no Python helps: examples/clients/node against a real mesh."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from pathlib import Path

import pytest

CLIENT = Path(__file__).resolve().parents[2] / "examples" / "clients" / "node"
pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(
        shutil.which("node") is None or shutil.which("npm") is None,
        reason="node and npm are not installed",
    ),
]


async def run(*command: str | Path, **env: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        env={**os.environ, **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.fixture(scope="session")
def install_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("node")


@pytest.fixture
async def node_path(install_folder) -> str:
    """Where the client's dependencies are; installed from its lock file where they are missing."""
    if (CLIENT / "node_modules").exists():
        return str(CLIENT / "node_modules")
    if not (install_folder / "node_modules").exists():
        for name in ("package.json", "package-lock.json", ".npmrc"):
            shutil.copy(CLIENT / name, install_folder)
        status, _, err = await run(
            "npm", "ci", "--no-audit", "--no-fund", "--prefix", install_folder
        )
        assert status == 0, err
    return str(install_folder / "node_modules")


async def test_a_job_is_created_watched_and_sampled_from_in_node(mesh, node_path):
    status, out, err = await run(
        "node", CLIENT / "client.js", "--address", mesh.address, NODE_PATH=node_path
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert re.fullmatch(r"created projects/demo/jobs/[a-z0-9-]+", lines[0])
    events = [line for line in lines if re.match(r"\d+ ", line)]
    assert [int(line.split()[0]) for line in events] == list(range(1, len(events) + 1))
    assert re.search(r"^\d+ state SUCCEEDED", events[-1])
    steps = [line for line in events if " step " in line and " version " in line]
    assert [line.split()[2] for line in steps] == ["1", "2", "3", "4", "5"]
    tokens = [line for line in lines if line.startswith("token ")]
    assert tokens
    assert all(float(line.split()[-1]) <= 0 for line in tokens)
    assert all(
        re.fullmatch(r"  by version 5, digest [0-9a-f]{64}", line)
        for line in lines
        if line.startswith("  by ")
    )
    assert re.fullmatch(r"12\+34 = -?\d+", lines[-1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(
            {"base_model": "gpt-9"}, '"reason":"NOT_FOUND"', id="by the mesh, with details"
        ),
        pytest.param({"stop": {"max_steps": 0}}, 'stop.max_steps"', id="with the key"),
        pytest.param(
            {"adapter": {"rnak": 8}}, "spec.adapter.rnak: no such key", id="by the client"
        ),
    ],
)
async def test_a_refusal_is_told_with_its_details(mesh, node_path, tmp_path, changes, says):
    job = json.loads((CLIENT / "job.json").read_text()) | changes
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job))
    status, out, err = await run(
        "node", CLIENT / "client.js", "--address", mesh.address, "--job", file, NODE_PATH=node_path
    )
    assert (status, out) == (1, "")
    assert says in err

"""Runs the exercises with several versions of the SDK, each in a process of its own.

Older ones are fetched from the package index once, into a folder of their own beside the tests'
environment, and lie first on the path of their process; what they need is what the newest needs.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollmesh.client import Client
from tests.mesh.sdk.calling import CLIENTS as PAGE_ORDER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.local.mesh import Mesh

ROOT = Path(__file__).resolve().parents[3]
OLDEST = "0.25.0"
"""The first that sends forward_backward as protobuf always; before, JSON unless it was told to."""
CLIENTS = (("TrainingClient",), ("ServiceClient", "SamplingClient"), ("RestClient", "AdminClient"))
"""Each group is exercised by a process and in a project of its own, all at the same time: what
takes long is waiting."""
BASE_MODEL = "arith"
FOLDERS = "TINKER_SDKS"
"""Environment variable: a folder with older SDKs, unpacked, each in one named by its version."""


class Unreachable(Exception):
    """The package index cannot be asked, and the version is not here yet."""


def newest() -> str:
    """The version that is installed."""
    return importlib.metadata.version("tinker")


async def runs(mesh: Mesh, folder: Path) -> list[dict[str, Any]]:
    """What came of the exercises: with the newest version and the oldest. `folder`: for files."""
    paths = {newest(): None, OLDEST: await fetched(OLDEST)}
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(run(mesh, version, path, folder)) for version, path in paths.items()
        ]
    return [each.result() for each in running]


async def run(mesh: Mesh, version: str, path: Path | None, folder: Path) -> dict[str, Any]:
    """What came of the exercises with the SDK in `path`, None: the installed one."""
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(_run_some(mesh, version, path, folder, clients))
            for clients in CLIENTS
        ]
    done = [each.result() for each in running]
    assert {each["version"] for each in done} == {version}
    outcomes = [outcome for each in done for outcome in each["outcomes"]]
    outcomes.sort(key=lambda outcome: PAGE_ORDER.index(outcome["client"]))
    return {"version": version, "outcomes": outcomes}


async def _run_some(
    mesh: Mesh, version: str, path: Path | None, folder: Path, clients: Sequence[str]
) -> dict[str, Any]:
    name = clients[0].lower()
    out = folder / f"tinker-{version}-{name}.json"
    project = f"{name}-{version.replace('.', '-')}"
    async with Client(mesh.address) as client:
        key, secret = await client.keys.create(f"projects/{project}", "exercises")
        try:
            await _python(
                "-m", "tests.mesh.sdk.runner", "--url", str(mesh.gateway_url), "--key", secret,
                "--project", project, "--base-model", BASE_MODEL, "--clients", *clients,
                "--folder", str(ROOT / "models" / "arith"), "--out", str(out), path=path,
            )  # fmt: skip
        finally:
            await client.keys.delete(key.name)
    done: dict[str, Any] = json.loads(out.read_text())
    return done


async def fetched(version: str) -> Path:
    """The folder of an older version.

    Raises:
        Unreachable: it is not here, and cannot be had.
    """
    folders = Path(os.environ.get(FOLDERS) or Path(sys.prefix) / "tinker-sdks")
    path = folders / version
    if not (path / "tinker").is_dir():
        pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check")
        try:
            await _python(*pip, "--target", str(path), f"tinker=={version}")
        except RuntimeError as error:
            raise Unreachable(f"tinker {version}: {error}") from None
    return path


async def _python(*arguments: str, path: Path | None = None) -> None:
    paths = [str(path)] if path else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "TINKER_TELEMETRY": "1",
    }
    # The SDK loads tokenizers by the base model's name: here that is a folder.
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=environment,
        cwd=ROOT / "models",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(output.decode(errors="replace")[-4000:])

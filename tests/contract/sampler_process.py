"""The sampler as the process that an operator starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@dataclass
class SamplerProcess:
    """One that serves."""

    process: asyncio.subprocess.Process
    address: str
    cache: Path

    def family(self) -> set[int]:
        """The process and all its descendants."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                parents[int(stat.parent.name)] = int(fields[1])
        family = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return family


def alive(pids: set[int]) -> set[int]:
    """Those of `pids` that run; what is dead and not yet reaped does not."""
    running = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                running.add(pid)
    return running


@contextlib.asynccontextmanager
async def sampler_process(folder: Path, values: dict[str, object]):
    """`python -m services.sampler` from when it serves; afterwards it is told to end.

    Nothing of it is left in any case.
    """
    config, cache = folder / "sampler.yaml", folder / "cache"
    cache.mkdir()
    config.write_text(yaml.safe_dump({**values, "listen": "127.0.0.1:0", "cache_dir": str(cache)}))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.sampler",
        "--config",
        str(config),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    family: set[int] = set()
    try:
        said = []
        async for line in process.stderr:
            said.append(line.decode())
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["message"] == "serving":
                    break
        else:
            pytest.fail("".join(said))
        sampler = SamplerProcess(process, f"127.0.0.1:{record['port']}", cache)
        family = sampler.family()
        async with asyncio.TaskGroup() as tasks:
            # What it says from now on must not fill the pipe.
            tasks.create_task(process.stderr.read())
            try:
                yield sampler
            finally:
                if process.returncode is None:
                    process.terminate()
        await process.wait()
    finally:
        for pid in alive(family | {process.pid}):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.wait()

"""How many episodes one environment holds at once, and how fast answers and code are scored.

`python -m benchmarks.environments` prints a table, and as its last line one JSON object of numbers.
All of it goes through a real reward service to one replica of an environment written in Python, as
processes of this machine, and once more to the replica directly.

- episodes_ok, episodes_failed: of EPISODES episodes that are all open at once, each waiting for its
  first action until every other one has begun; then each is played to its end.
- episodes_leaked: what the replica has open when all of them are over, and half as many more have
  been cut off in the middle by their client.
- scores_per_s: answers scored by the environment through the reward service, in batches of 64, 8
  at a time.
- sandbox_p50_ms: from start to end of a sandboxed program that does nothing, one after another.

Memory is the resident set of a process before, with all episodes open, and after.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from benchmarks.environments_world import OPEN
from rollmesh import chat
from rollmesh.client import EnvironmentClient
from rollmesh.errors import MeshError
from rollmesh.rpc.channel import channel
from services.reward.config import SandboxConfig
from services.reward.sandbox import sandbox
from services.reward.sandbox.measure import start_s

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).resolve().parents[1]
EPISODES = 16_384
WORLD = "world"
OPENING = 512
"""Episodes that are begun at a time: as many again wait in no queue."""
BATCH, BATCHES_AT_ONCE, NUM_BATCHES = 64, 8, 400
SANDBOX_RUNS = 100
TIMEOUT_S = 600.0

Figures = dict[str, float]


def main() -> None:
    """Print the table and the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=EPISODES, help="open at once")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(measure(arguments.episodes))))  # noqa: T201


async def measure(count: int) -> Figures:
    """All of it."""
    print(f"{count:,} episodes at once; {os.cpu_count()} processors")  # noqa: T201
    figures: Figures = {}
    async with _world() as (world, world_pid), _reward(world, count) as (reward, reward_pid):
        pids = {"environment": world_pid, "reward service": reward_pid}
        for way, address in (("directly", world), ("through the reward service", reward)):
            async with channel(address) as connected:
                client = EnvironmentClient(connected)
                figures = await _episodes(client, count, way, pids)
                figures["scores_per_s"] = await _scores(client, way)
    figures["sandbox_p50_ms"] = await _sandbox()
    return figures


async def _episodes(
    client: EnvironmentClient, count: int, way: str, pids: dict[str, int]
) -> Figures:
    """Played `way`; the figures of it."""
    print(f"\n{way}")  # noqa: T201
    before = {name: _resident_mib(pid) for name, pid in pids.items()}
    begun, failures = _Gate(count), list[str]()
    opening = asyncio.Semaphore(OPENING)
    start = time.perf_counter()

    async def play(number: int) -> bool:
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with opening:
                    episode = await stack.enter_async_context(
                        client.episode(WORLD, f"train-{number % 1024}", seed=number)
                    )
                await begun.pass_through()
                await episode.act(chat.Message("assistant", "a"))
                last = await episode.act(chat.Message("assistant", "b"))
                return last.done and last.reward == 1.0
        except MeshError as error:
            failures.append(str(error))
            await begun.pass_through()
            return False

    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
        playing = [tasks.create_task(play(number)) for number in range(count)]
        await begun.all_here.wait()
        opened_s = time.perf_counter() - start
        peak = {name: _resident_mib(pid) for name, pid in pids.items()}
        open_now = await _open(client)
        begun.open()
    num_ok = sum(task.result() for task in playing)
    print(f"  open at once, as the environment counts: {open_now:,}, in {opened_s:.1f} s")  # noqa: T201
    print(f"  played to their end: {num_ok:,}, {time.perf_counter() - start:.1f} s in all")  # noqa: T201
    if failures:
        print(f"  the first of {len(failures)} failures: {failures[0]}")  # noqa: T201
    await _cut_off(client, count // 2)
    leaked = await _left(client)
    for name, pid in pids.items():
        each = (peak[name] - before[name]) * 1024 / count
        print(  # noqa: T201
            f"  {name}: {before[name]:,.0f} MiB before, {peak[name]:,.0f} with all open "
            f"({each:.1f} KiB each), {_resident_mib(pid):,.0f} after"
        )
    return {
        "episodes_ok": num_ok,
        "episodes_failed": count - num_ok,
        "episodes_leaked": leaked,
    }


async def _cut_off(client: EnvironmentClient, count: int) -> None:
    """Begin episodes, and go away in the middle of each."""
    here = _Gate(count)
    opening = asyncio.Semaphore(OPENING)

    async def begin(number: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with opening:
                await stack.enter_async_context(client.episode(WORLD, f"train-{number % 1024}"))
            await here.pass_through()

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(begin(number))
        await here.all_here.wait()
        here.open()


async def _left(client: EnvironmentClient) -> int:
    """What the environment has open, once that changes no more, or 2 s after all are gone."""
    async with asyncio.timeout(TIMEOUT_S):
        end = time.perf_counter() + 2
        while (left := await _open(client)) and time.perf_counter() < end:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.1)
    return left


async def _open(client: EnvironmentClient) -> int:
    item = chat.Answered(
        chat.Task(OPEN, fields={"what": OPEN}), [chat.Message("assistant", "how many?")]
    )
    (scored,) = await client.score(WORLD, [item])
    return int(scored.reward)


async def _scores(client: EnvironmentClient, way: str) -> float:
    task = chat.Task("a", "train", (chat.Message("user", "task 0"),))
    items = [chat.Answered(task, [*task.messages, chat.Message("assistant", "x" * 64)])] * BATCH
    at_once = asyncio.Semaphore(BATCHES_AT_ONCE)

    async def score() -> None:
        async with at_once:
            await client.score(WORLD, items)

    speeds = []
    for _ in range(3):
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_BATCHES):
                tasks.create_task(score())
        speeds.append(BATCH * NUM_BATCHES / (time.perf_counter() - start))
    spread = (max(speeds) - min(speeds)) / statistics.median(speeds)
    print(f"  answers scored, {way}: {statistics.median(speeds):,.0f}/s (spread {spread:.2f})")  # noqa: T201
    return round(statistics.median(speeds))


async def _sandbox() -> float:
    async with sandbox(SandboxConfig()) as untrusted:
        seconds = await start_s(untrusted, runs=SANDBOX_RUNS)
        print(f"\nan empty program in a sandbox ({untrusted}): {seconds * 1000:.1f} ms")  # noqa: T201
    return round(seconds * 1000, 1)


class _Gate:
    """Where `count` meet before any of them goes on."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self._is_open = asyncio.Event()
        self.all_here = asyncio.Event()

    async def pass_through(self) -> None:
        """Come here, and go on when it is open."""
        self._missing -= 1
        if not self._missing:
            self.all_here.set()
        await self._is_open.wait()

    def open(self) -> None:
        """Let all go on."""
        self._is_open.set()


@contextlib.asynccontextmanager
async def _world() -> AsyncIterator[tuple[str, int]]:
    """The replica's address and process."""
    async with _process("-m", "benchmarks.environments_world") as (process, line):
        yield line.removeprefix("listening on ").strip(), process.pid


@contextlib.asynccontextmanager
async def _reward(world: str, count: int) -> AsyncIterator[tuple[str, int]]:
    """The reward service's address and process, which knows the replica."""
    config = {
        "listen": "127.0.0.1:0",
        "environments": [
            {
                "name": WORLD,
                "addresses": [world],
                "max_concurrent": count + BATCHES_AT_ONCE,
                "max_waiting": count,
            }
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reward.yaml"
        path.write_text(yaml.safe_dump(config))
        async with _process("-m", "services.reward", "--config", str(path)) as (process, line):
            address = f"127.0.0.1:{json.loads(line)['port']}"
            async with channel(address) as connected:
                client = EnvironmentClient(connected)
                while not await client.describe():  # noqa: ASYNC110 - the same
                    await asyncio.sleep(0.1)
            yield address, process.pid


@contextlib.asynccontextmanager
async def _process(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A Python process, and the line by which it says that it serves."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process, await _serving_line(process)
    finally:
        process.terminate()
        await process.wait()


async def _serving_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    async for line in process.stdout:
        text = line.decode()
        if "listening on" in text or '"serving"' in text:
            return text
    raise RuntimeError("a process ended before it served")


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024**2


if __name__ == "__main__":
    main()

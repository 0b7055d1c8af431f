"""The example environments of other languages: what each needs, its build, its process."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from rollmesh.client import EnvironmentClient
from rollmesh.rpc.channel import channel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc


FOLDER = Path(__file__).parents[2] / "examples" / "environments"
START_S = 60
"""Seconds that a process gets to serve, and to end: against hanging, nothing that is promised."""


@dataclass(frozen=True)
class Example:
    """One folder of examples/environments. `needs`: programs on the path, or files."""

    language: str
    environment: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    plays: bool = True
    """Whether it has episodes; else it scores single turns."""

    @property
    def folder(self) -> Path:
        return FOLDER / self.language

    @property
    def missing(self) -> list[str]:
        return [
            need
            for need in self.needs
            if not (Path(need).exists() if need.startswith("/") else shutil.which(need))
        ]


EXAMPLES = {
    example.environment: example
    for example in (
        Example("node", "guess-the-number", ("node", "main.js"), ("make", "node", "npm")),
        Example(
            "go",
            "grid-world",
            ("build/grid-world",),
            (
                *("make", "go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"),
                "/usr/share/gocode/src/google.golang.org/grpc",
                "/usr/share/gocode/src/google.golang.org/protobuf",
            ),
        ),
        Example(
            "java",
            "word-ladder",
            ("build/word-ladder",),
            ("make", "javac", "java", "protoc", "/usr/share/java/grpc-netty.jar"),
        ),
        Example(
            "cpp",
            "calculator",
            ("build/calculator",),
            (
                *("make", "g++", "pkg-config", "protoc", "grpc_cpp_plugin"),
                "/usr/include/grpcpp/grpcpp.h",
                "/usr/include/nlohmann/json.hpp",
            ),
        ),
        Example(
            "rust",
            "sort-letters",
            ("build/sort-letters",),
            ("make", "cargo", "protoc"),
            plays=False,
        ),
    )
}
PLAYED = [name for name, example in EXAMPLES.items() if example.plays]


@dataclass
class Running:
    """A process that serves an example, and a client of it."""

    example: Example
    process: asyncio.subprocess.Process
    address: str
    channel: grpc.aio.Channel
    client: EnvironmentClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = EnvironmentClient(self.channel)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextlib.asynccontextmanager
async def started(
    example: Example, *options: str, errors: IO[bytes]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The example's process. What it says on standard error goes to a file: a pipe fills up."""
    program, *arguments = example.command
    path = str(example.folder / program) if "/" in program else program
    process = await asyncio.create_subprocess_exec(
        *(path, *arguments, *options),
        cwd=example.folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=errors,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ended(example: Example, *options: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a process that ends by itself."""
    with tempfile.TemporaryFile() as errors:
        async with started(example, *options, errors=errors) as process:
            out, _ = await asyncio.wait_for(process.communicate(), START_S)
        errors.seek(0)
        return process.returncode, out.decode(), errors.read().decode()


@contextlib.asynccontextmanager
async def serving(example: Example, *options: str) -> AsyncIterator[Running]:
    """The example from when it says where it listens; afterwards it is told to end, and does well.

    It has said one line, whatever happened to it; nothing of it is left in any case.
    """
    listen = ("--listen", "127.0.0.1:0")
    with tempfile.TemporaryFile() as errors:
        async with started(example, *listen, *options, errors=errors) as process:
            line = (await asyncio.wait_for(process.stdout.readline(), START_S)).decode()
            errors.seek(0)
            assert line.startswith("listening on 127.0.0.1:"), (line, errors.read())
            async with channel(line.split()[-1]) as opened:
                yield Running(example, process, line.split()[-1], opened)
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            more, _ = await asyncio.wait_for(process.communicate(), START_S)
            errors.seek(0)
            assert (process.returncode, more) == (0, b""), (process.returncode, more, errors.read())


async def built(example: Example) -> None:
    """Build it by its own Makefile; skip the test where what that needs is missing."""
    if missing := example.missing:
        pytest.skip(f"{example.folder.name}: not installed: {', '.join(missing)}")
    if example.language == "rust":
        status, output = await made(example, "fetch")
        if status:
            pytest.skip(f"rust: crates out of reach, and vendor.sh has not been run: {output}")
    begin = time.monotonic()
    status, output = await made(example, "-j2")
    assert status == 0, output
    print(f"{example.language} built in {time.monotonic() - begin:.1f} s")


async def made(example: Example, *arguments: str) -> tuple[int, str]:
    """What `make` in its folder ends with, and says."""
    make = await asyncio.create_subprocess_exec(
        *("make", *arguments),
        cwd=example.folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await make.communicate()
    finally:
        if make.returncode is None:
            make.terminate()
            await make.wait()
    return make.returncode, output.decode()

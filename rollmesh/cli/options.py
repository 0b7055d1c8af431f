"""What the commands share: options, names given short or in full, and one call to the mesh."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from rollmesh import names
from rollmesh.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from rollmesh.client import Client

T = TypeVar("T")

ADDRESS = "127.0.0.1:7400"
PROJECT = "default"

Address = Annotated[
    str,
    typer.Option(
        envvar="ROLLMESH_ADDRESS",
        metavar="HOST:PORT",
        help="Where the coordinator is; of several, IP:PORT,IP:PORT: the one that leads.",
    ),
]
Project = Annotated[
    str,
    typer.Option(envvar="ROLLMESH_PROJECT", metavar="ID", help="Project of names given short."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Id, or projects/P/jobs/J.")]
AdapterName = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Id, or projects/P/adapters/A.")
]
CheckpointName = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="ADAPTER/ID, or projects/P/adapters/A/checkpoints/C."
    ),
]
Folder = Annotated[
    Path,
    typer.Option("--output", metavar="DIR", help="The PEFT folder to make; must not exist yet."),
]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def ask(address: str, question: Callable[["Client"], Awaitable[T]]) -> T:
    """The answer of the mesh at `address` to `question`."""
    # Here, because grpc takes half a second to import and --help needs none of it.
    from rollmesh.client import Client  # noqa: PLC0415

    async def answer() -> T:
        async with Client(address) as client:
            return await question(client)

    try:
        return asyncio.run(answer())
    except Unavailable as error:
        raise Unavailable(
            f"{error} (the coordinator asked is {address}; "
            "--address or ROLLMESH_ADDRESS chooses another)",
            **error.context,
        ) from error


async def collect(items: AsyncIterator[T]) -> list[T]:
    """All of `items`."""
    return [item async for item in items]


def parent_name(project: str) -> str:
    """The resource name of the project with this id."""
    return names.project_name(names.check_id(project, field="project"))


def job_name(name: str, project: str) -> str:
    """The resource name of a job that is named by its id in `project`, or in full."""
    if "/" in name:
        return names.job_name(*names.parse_job(name, field="job"))
    parent_name(project)
    return names.job_name(project, names.check_id(name, field="job"))


def adapter_name(name: str, project: str) -> str:
    """The resource name of an adapter that is named by its id in `project`, or in full."""
    if "/" in name:
        return names.adapter_name(*names.parse_adapter(name, field="adapter"))
    parent_name(project)
    return names.adapter_name(project, names.check_id(name, field="adapter"))


def checkpoint_name(name: str, project: str) -> str:
    """The resource name of a checkpoint that is named ADAPTER/ID in `project`, or in full."""
    if name.count("/") == 1:
        parent_name(project)
        adapter, checkpoint = (names.check_id(part, field="checkpoint") for part in name.split("/"))
    else:
        project, adapter, checkpoint = names.parse_checkpoint(name, field="checkpoint")
    return names.checkpoint_name(names.adapter_name(project, adapter), checkpoint)


def seconds_of(duration: str, *, field: str) -> float | None:
    """Seconds of a duration such as 90s, 30m, 12h or 7d; "": None."""
    if not duration:
        return None
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhd])", duration)
    if match is None:
        raise InvalidRequest(
            f"{field}: {duration!r} is not a duration such as 90s, 30m, 12h or 7d",
            field=field,
            value=duration,
            allowed="a number and s, m, h or d",
        )
    return float(match[1]) * _UNITS_S[match[2]]

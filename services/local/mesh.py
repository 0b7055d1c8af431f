"""A whole mesh as processes of this machine, for the life of a block.

Every service keeps its address for as long as the mesh runs, however often it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import yaml

from rollmesh.errors import FailedPrecondition, Unavailable
from services.gateway.config import GatewayConfig
from services.local.config import complete
from services.local.probes import environment_serves, until_http_serves, until_serving
from services.local.processes import Processes, processes
from services.local.supervisor import Program, Supervised

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from services.local.config import LocalConfig, LocalEnvironment, ServiceConfig

ROOT = Path(__file__).resolve().parents[2]
"""Services are not installed: their processes are told where they lie."""
STOP_MARGIN_S = 5.0
"""What a service gets beyond its drain_s before it is killed."""


@dataclass(frozen=True, slots=True)
class Member:
    """One service of a mesh. `address`: host:port, for as long as the mesh runs."""

    address: str
    supervised: Supervised

    @property
    def pid(self) -> int | None:
        """Of the process that runs now; None: the last has died and the next was not started."""
        return self.supervised.pid

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.supervised.program.log


@dataclass(frozen=True, slots=True)
class Mesh:
    """A mesh that runs.

    `members` are coordinator, trainer-0, …, sampler-0, …, reward, gateway where there is one, and
    environment-NAME of each environment that it has started.
    """

    members: Mapping[str, Member]

    @property
    def address(self) -> str:
        """Of the coordinator."""
        return self.members["coordinator"].address

    @property
    def gateway_url(self) -> str | None:
        """Of the gateway; None: there is none."""
        gateway = self.members.get("gateway")
        return None if gateway is None else f"http://{gateway.address}"

    def kill(self, name: str) -> None:
        """Kill the process of a member, as a crash would; it is started again."""
        self.members[name].supervised.kill()

    async def serving(self) -> None:
        """Return once every member is SERVING; after `kill`, once the new process is."""
        for member in self.members.values():
            await member.supervised.serving.wait()


@contextlib.asynccontextmanager
async def mesh(
    config: LocalConfig,
    state_dir: Path,
    say: Callable[[str], None] = print,
    *,
    modules: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[Mesh]:
    """A mesh whose members are all SERVING; it ends with the block. `say` hears what happens.

    `modules`: by service what to run in place of services.NAME.

    In `state_dir`: config/, logs/, blobs/, coordinator.sqlite, and endpoints.json while it runs.

    Raises:
        FailedPrecondition: another mesh runs in `state_dir`.
        Unavailable: a member cannot be brought to serve, at the start or later.
    """
    for folder in ("config", "logs"):
        (state_dir / folder).mkdir(parents=True, exist_ok=True)
    with _alone_in(state_dir), _single_error(), _addresses(config) as addresses:
        # A mesh that was killed has left it.
        _endpoints_file(state_dir).unlink(missing_ok=True)
        configs = complete(config, addresses, state_dir)
        async with processes() as started, asyncio.TaskGroup() as tasks:
            members = {
                name: Member(
                    addresses[name],
                    _supervised(
                        name, configs[name], addresses[name], state_dir, started, say, modules
                    ),
                )
                for name in configs
            }
            for name, program in config.programs().items():
                supervised = environment(name, program, addresses[name], state_dir, started, say)
                members[name] = Member(addresses[name], supervised)
            running = {
                name: tasks.create_task(member.supervised.keep_running())
                for name, member in members.items()
            }
            try:
                await _until_all_serve(members, config.start_s)
                with _endpoints(state_dir, members):
                    yield Mesh(members)
            finally:
                await _stop(running)


def _supervised(
    name: str,
    config: ServiceConfig,
    address: str,
    state_dir: Path,
    started: Processes,
    say: Callable[[str], None],
    modules: Mapping[str, str],
) -> Supervised:
    """The service with its configuration written down, not started yet."""
    service = name.partition("-")[0]
    module = modules.get(service, f"services.{service}")
    path, log = state_dir / "config" / f"{name}.yaml", state_dir / "logs" / f"{name}.log"
    serves = until_http_serves if isinstance(config, GatewayConfig) else until_serving
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    log.write_bytes(b"")  # the log is that of this mesh, not of the one before
    return Supervised(
        Program(
            name=name,
            command=(sys.executable, "-m", module, "--config", str(path)),
            log=log,
            stop_s=config.drain_s + STOP_MARGIN_S,
            environment={"PYTHONPATH": _first(str(ROOT), "PYTHONPATH")},
        ),
        started,
        until_serving=lambda: serves(address),
        say=say,
    )


def environment(
    name: str,
    config: LocalEnvironment,
    address: str,
    state_dir: Path,
    started: Processes,
    say: Callable[[str], None],
) -> Supervised:
    """An author's program, not started yet."""
    log = state_dir / "logs" / f"{name}.log"
    log.write_bytes(b"")
    return Supervised(
        Program(
            name=name,
            command=(*config.command, "--listen", address),
            log=log,
            stop_s=STOP_MARGIN_S,
            environment={
                "PYTHONPATH": _first(str(ROOT), "PYTHONPATH"),
                "PATH": _first(str(Path(sys.executable).parent), "PATH"),
            },
        ),
        started,
        until_serving=lambda: until_serving(address, environment_serves),
        say=say,
    )


def _first(folder: str, variable: str) -> str:
    """The search path in `variable`, with `folder` before all that it has."""
    return os.pathsep.join(filter(None, [folder, os.environ.get(variable)]))


async def _until_all_serve(members: Mapping[str, Member], within_s: float) -> None:
    try:
        async with asyncio.timeout(within_s):
            await Mesh(members).serving()
    except TimeoutError:
        late = [member for member in members.values() if not member.supervised.serving.is_set()]
        names = ", ".join(f"{member.supervised.program.name} ({member.log})" for member in late)
        raise Unavailable(f"not serving after {within_s:g} s: {names}") from None


async def _stop(running: Mapping[str, asyncio.Task[None]]) -> None:
    """Stop who would take the others' end for a failure before them: gateway, then coordinator."""
    first = [{running[name]} for name in ("gateway", "coordinator") if name in running]
    for tasks in (*first, set(running.values()).difference(*first)):
        for task in tasks:
            # Where a member has failed for good, the task group has cancelled the others already.
            if not task.cancelling():
                task.cancel()
        await asyncio.wait(tasks)


@contextlib.contextmanager
def _addresses(config: LocalConfig) -> Iterator[dict[str, str]]:
    """Where each member is reached: most at a free address, reserved while the block runs."""
    with contextlib.ExitStack() as stack:
        free = {
            name: f"127.0.0.1:{stack.enter_context(_reserved_port())}"
            for name in (*config.members(), *config.programs())
        }
        yield {**free, **config.given_addresses()}


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that nobody is given by chance, but that a server may listen at.

    The kernel gives no bound port away; gRPC's servers and uvicorn set SO_REUSEADDR too, and so may
    bind it again for as long as nobody else listens.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _endpoints_file(state_dir: Path) -> Path:
    return state_dir / "endpoints.json"


@contextlib.contextmanager
def _endpoints(state_dir: Path, members: Mapping[str, Member]) -> Iterator[None]:
    """endpoints.json: for programs, while the mesh serves."""
    path = _endpoints_file(state_dir)
    endpoints = {name: {"address": m.address, "log": str(m.log)} for name, m in members.items()}
    path.with_suffix(".new").write_text(json.dumps(endpoints, indent=2) + "\n")
    path.with_suffix(".new").rename(path)
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def _alone_in(state_dir: Path) -> Iterator[None]:
    """Two coordinators on one store would undo each other's work."""
    with (state_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"another mesh runs in {state_dir}", resource=state_dir
            ) from None
        yield


@contextlib.contextmanager
def _single_error() -> Iterator[None]:
    """What has failed first, without the task group around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None

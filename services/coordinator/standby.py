"""A coordinator's life beside others: it follows until it leads, and ends when it leads no more."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rollmesh.errors import NotLeader
from rollmesh.rpc.server import serving, terminated
from rollmesh.telemetry import log_fields
from services.coordinator.leadership import Leadership
from services.coordinator.servicers import SERVICES
from services.coordinator.servicers.door import Door

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

    from rollmesh.rpc.server import Serving
    from services.coordinator.assembly import Serve
    from services.coordinator.config import CoordinatorConfig
    from services.coordinator.store import Store

Result = TypeVar("Result")

log = logging.getLogger("services.coordinator")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")
_EVERYWHERE = {"0.0.0.0", "[::]"}  # noqa: S104 - what others listen at


async def stand_by(
    config: CoordinatorConfig,
    store: Store,
    lead: Callable[[Serve], AbstractAsyncContextManager[object]],
) -> None:
    """Serve until the process is told to end; `lead` is what the leader does meanwhile."""
    door = Door()
    async with (
        serving(door.register, services=SERVICES, address=config.listen) as server,
        asyncio.TaskGroup() as tasks,
    ):
        told = tasks.create_task(terminated())
        host = config.listen.rpartition(":")[0]
        leadership = Leadership(
            store.leadership,
            holder=_place(host, server.port),
            address=config.advertise or _reached_at(host, server.port),
            lease_s=config.leader_lease_s,
        )
        with log_fields(port=server.port):
            epoch = await _unless(told, leadership.campaign(partial(_follow, door)))
            if epoch is None:
                return
            store.lead(epoch, lambda: _end("another coordinator leads by now"))
            keeping = tasks.create_task(_keep(leadership, epoch, server))
            try:
                async with lead(partial(door.opened, server=server, drain_s=config.drain_s)):
                    log.info("serving")
                    await told
            finally:
                keeping.cancel()
                await leadership.give_up(epoch)


def _follow(door: Door, leader: str) -> None:
    door.follow(leader)
    if leader:
        log.info("follows the leader at %s", leader)


async def _keep(leadership: Leadership, epoch: int, server: Serving) -> None:
    try:
        # Of several addresses a client calls those that serve: two must never say so.
        await leadership.keep(epoch, server.pause)
    except NotLeader as error:
        _end(str(error))


def _end(why: str) -> NoReturn:
    """End this process now: whatever is under way must go no further, nor be cleaned up after.

    Connections break, which callers see as UNAVAILABLE, and a supervisor starts a follower.
    """
    log.critical("leads no more: %s", why)
    os._exit(1)


def _place(host: str, port: int) -> str:
    """What no two processes are at the same time: whoever listens there now succeeds the other.

    So a coordinator that was killed and is started again waits for no lease. Containers on one
    machine share its boot, and may its name, but not the network in which a port has one listener.
    """
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else os.urandom(16).hex()
    network = _NETWORK.readlink() if _NETWORK.is_symlink() else ""
    return f"{socket.gethostname()} {host}:{port} {network} {boot_id}"


def _reached_at(host: str, port: int) -> str:
    """Where others reach who listens at `host`."""
    return f"{socket.gethostname() if host in _EVERYWHERE else host}:{port}"


async def _unless(told: asyncio.Task[None], work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` answers; None: `told` came first, and it is cancelled."""
    task = asyncio.create_task(work)
    await asyncio.wait({told, task}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.wait({task})
    return None

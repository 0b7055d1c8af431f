"""What reaches environments, put together: `__main__`'s other half, which tests use too."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rollmesh.client import EnvironmentClient, HealthClient
from rollmesh.rpc.channel import channel_to_stranger
from services.reward.environments.addresses import Resolver
from services.reward.environments.failures import first_of_several
from services.reward.environments.local import ServedHere
from services.reward.environments.ports import Connection
from services.reward.environments.remote import RemoteEnvironment
from services.reward.environments.router import Router

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.reward.environments.config import EnvironmentConfig
    from services.reward.ports import LocalEnvironment


@contextlib.asynccontextmanager
async def routing(
    environments: Sequence[EnvironmentConfig], here: Sequence[LocalEnvironment] = ()
) -> AsyncIterator[Router]:
    """A router to `environments` that others serve and those that are `here`, while the block runs.

    Raises:
        InvalidRequest: a file of their TLS cannot be read.
    """
    with Resolver() as resolve:
        router = Router(
            [
                *(RemoteEnvironment(config, connect, resolve) for config in environments),
                *map(ServedHere, here),
            ]
        )
        with first_of_several():
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(router.run())
                try:
                    yield router
                finally:
                    watching.cancel()


def connect(config: EnvironmentConfig, place: str, authority: str) -> Connection:
    """To a replica; its health over a connection of its own, which many streams cannot fill."""
    calls = channel_to_stranger(place, config.tls, authority=authority)
    health = channel_to_stranger(place, config.tls, authority=authority)

    async def close() -> None:
        await calls.close()
        await health.close()

    return Connection(EnvironmentClient(calls), HealthClient(health), close)

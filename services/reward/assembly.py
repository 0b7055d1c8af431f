"""What reaches environments, put together: `__main__`'s other half, which tests use too."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rollmesh.client import EnvironmentClient, HealthProbe
from rollmesh.rpc.channel import Stranger, read_credentials
from services.reward.environments.addresses import Resolver
from services.reward.environments.failures import first_of_several
from services.reward.environments.local import ServedHere
from services.reward.environments.ports import Connection
from services.reward.environments.remote import RemoteEnvironment
from services.reward.environments.router import Router

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from rollmesh.config import TlsConfig
    from services.reward.config import RewardConfig
    from services.reward.environments.config import EnvironmentConfig
    from services.reward.environments.ports import Connect
    from services.reward.ports import LocalEnvironment
    from services.reward.scoring import Isolation


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
                *(
                    RemoteEnvironment(config, connector(config.tls), resolve)
                    for config in environments
                ),
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


def connector(tls: TlsConfig | None) -> Connect:
    """Connects to replicas, for calls, and beside these and the event loop for their health.

    Raises:
        InvalidRequest: a file of `tls` cannot be read.
    """
    credentials = read_credentials(tls) if tls else None
    server_name = tls.server_name if tls else ""

    def connect(place: str, authority: str) -> Connection:
        server = Stranger(place, authority, credentials, server_name)
        calls, health = server.channel(), server.threaded_channel()

        async def close() -> None:
            await calls.close()
            health.close()

        return Connection(EnvironmentClient(calls), HealthProbe(health), close)

    return connect


def local_environments(config: RewardConfig, isolation: Isolation) -> list[LocalEnvironment]:
    """Those that this service has itself. Imports what they need: blocks.

    Raises:
        InvalidRequest: there is no such kind, or it does not take its configuration.
        FailedPrecondition: reasoning-gym is not installed.
    """
    if not config.reasoning_gym:
        return []
    from services.reward.reasoning_tasks import ReasoningGym  # noqa: PLC0415 - takes a second

    return [
        ReasoningGym(
            each.name,
            each.tasks,
            each.config,
            {"train": each.num_train, "heldout": each.num_heldout},
            isolation,
        )
        for each in config.reasoning_gym
    ]

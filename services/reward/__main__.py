"""The reward service: `python -m services.reward --config FILE`."""

# ruff: noqa: PLC0415 - a mistake in the configuration is told before anything heavy is imported

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rollmesh.config import from_command_line, run
from services.reward.config import RewardConfig

if TYPE_CHECKING:
    import grpc

    from services.reward.registry import Registry

log = logging.getLogger("services.reward")


def main() -> None:
    """Read the configuration, then serve until told to end."""
    run(serve(from_command_line(RewardConfig, "services.reward")))


async def serve(config: RewardConfig, registry: type[Registry] | None = None) -> None:
    """Serve until the process is told to end; `registry` None: the plain one."""
    from rollmesh.api.environment.v1.environment_service_pb2_grpc import (
        add_EnvironmentServiceServicer_to_server,
    )
    from rollmesh.api.reward.v1 import reward_service_pb2 as pb
    from rollmesh.api.reward.v1.reward_service_pb2_grpc import (
        add_RewardServiceServicer_to_server,
    )
    from rollmesh.rpc.server import serving, terminated
    from rollmesh.telemetry import log_fields, telemetry
    from services.reward import environment_servicer
    from services.reward.assembly import local_environments, routing
    from services.reward.functions import FUNCTIONS
    from services.reward.registry import Registry as PlainRegistry
    from services.reward.sandbox import sandbox
    from services.reward.servicer import RewardServicer
    from services.reward.workers import Workers

    made = registry or PlainRegistry
    with telemetry("reward", config.telemetry):
        async with (
            Workers(config.num_workers, config.item_timeout_s) as workers,
            sandbox(config.sandbox) as untrusted,
            routing(
                config.environments, await asyncio.to_thread(local_environments, config, workers)
            ) as router,
        ):

            def register(server: grpc.aio.Server) -> None:
                functions = made(
                    FUNCTIONS, workers, max_batches=config.max_batches, sandbox=untrusted
                )
                add_RewardServiceServicer_to_server(
                    RewardServicer(functions, router.list_environments), server
                )
                add_EnvironmentServiceServicer_to_server(
                    environment_servicer.EnvironmentServicer(router), server
                )

            async with serving(
                register,
                services=[
                    pb.DESCRIPTOR.services_by_name["RewardService"].full_name,
                    environment_servicer.SERVICE,
                ],
                address=config.listen,
                drain_s=config.drain_s,
            ) as running:
                await running.ready()
                with log_fields(port=running.port, sandbox=str(untrusted)):
                    log.info("serving")
                await terminated()
                router.end(config.drain_s)


if __name__ == "__main__":
    main()

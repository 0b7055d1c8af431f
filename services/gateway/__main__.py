"""The gateway: `python -m services.gateway --config FILE`."""

# ruff: noqa: PLC0415 - a mistake in the configuration is told before anything heavy is imported

from __future__ import annotations

import logging

from rollmesh.config import from_command_line, run
from services.gateway.config import GatewayConfig

log = logging.getLogger("services.gateway")


def main() -> None:
    """Read the configuration, then serve until told to end."""
    run(serve(from_command_line(GatewayConfig, "services.gateway")))


async def serve(config: GatewayConfig) -> None:
    """Serve until the process is told to end."""
    import asyncio

    from rollmesh.client import Client
    from rollmesh.rpc.server import terminated
    from rollmesh.telemetry import log_fields, telemetry
    from services.gateway.app import app
    from services.gateway.gateway import gateway
    from services.gateway.openai.mounted import openai_routes
    from services.gateway.ports import Mesh
    from services.gateway.server import many_sockets, serving

    many_sockets()
    ending = asyncio.Event()
    with telemetry("gateway", config.telemetry):
        async with Client(config.coordinator) as client:
            cores = gateway(config, Mesh.of(client), ending)
            application = app(cores, openai_routes(config, cores, client))
            async with serving(application, config.listen, drain_s=config.drain_s) as port:
                with log_fields(port=port):
                    log.info("serving")
                await terminated()
                ending.set()


if __name__ == "__main__":
    main()

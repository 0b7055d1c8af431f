"""The coordinator: `python -m services.coordinator --config FILE`."""

# ruff: noqa: PLC0415 - a mistake in the configuration is told before anything heavy is imported

from __future__ import annotations

import contextlib
import logging

from rollmesh.config import from_command_line, run
from services.coordinator.config import CoordinatorConfig

log = logging.getLogger("services.coordinator")


def main() -> None:
    """Read the configuration, then serve until told to end."""
    run(serve(from_command_line(CoordinatorConfig, "services.coordinator")))


async def serve(config: CoordinatorConfig) -> None:
    """Serve until the process is told to end."""
    from rollmesh.client import RewardClient, SamplerClient, TrainerClient
    from rollmesh.rpc.channel import channel
    from rollmesh.rpc.server import terminated
    from rollmesh.telemetry import log_fields, telemetry
    from services.coordinator.assembly import coordinator
    from services.coordinator.play import playing
    from services.coordinator.store import open_store
    from services.coordinator.tokenizer import load_tokenizer

    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(telemetry("coordinator", config.telemetry))
        store = await stack.enter_async_context(
            open_store(config.database_url, request_retention_s=config.request_retention_s)
        )
        peers = {*config.trainers, *config.samplers, config.reward}
        to = {peer: await stack.enter_async_context(channel(peer)) for peer in peers}
        reward = RewardClient(to[config.reward])
        server = await stack.enter_async_context(
            coordinator(
                config,
                store,
                trainers={address: TrainerClient(to[address]) for address in config.trainers},
                samplers={address: SamplerClient(to[address]) for address in config.samplers},
                reward=reward,
                play=lambda training, sampling: playing(
                    training,
                    sampling,
                    reward,
                    lambda model: load_tokenizer(config.tokenizer_of(model)),
                ),
            )
        )
        with log_fields(port=server.port):
            log.info("serving")
        await terminated()


if __name__ == "__main__":
    main()

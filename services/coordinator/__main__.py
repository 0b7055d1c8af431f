"""The coordinator: `python -m services.coordinator --config FILE`."""

# ruff: noqa: PLC0415 - a mistake in the configuration is told before anything heavy is imported

from __future__ import annotations

import contextlib
import functools

from rollmesh.config import from_command_line, run
from services.coordinator.config import CoordinatorConfig


def main() -> None:
    """Read the configuration, then serve until told to end."""
    run(serve(from_command_line(CoordinatorConfig, "services.coordinator")))


async def serve(config: CoordinatorConfig) -> None:
    """Serve until the process is told to end."""
    from rollmesh.client import EnvironmentClient, RewardClient, SamplerClient, TrainerClient
    from rollmesh.rpc.channel import channel
    from rollmesh.telemetry import telemetry
    from rollmesh.tokenizer import ModelTokenizer, load_tokenizer
    from services.coordinator.assembly import coordinator
    from services.coordinator.play import playing
    from services.coordinator.standby import stand_by
    from services.coordinator.store import open_store

    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(telemetry("coordinator", config.telemetry))
        store = await stack.enter_async_context(
            open_store(
                config.database_url,
                request_retention_s=config.request_retention_s,
                rollout_retention_s=config.rollout_retention_s,
                leader_lease_s=config.leader_lease_s,
            )
        )
        peers = {*config.trainers, *config.samplers, config.reward}
        to = {peer: await stack.enter_async_context(channel(peer)) for peer in peers}

        # One for each base model that anybody ever asked for.
        @functools.cache
        def load(base_model: str) -> ModelTokenizer:
            return load_tokenizer(config.tokenizer_of(base_model))

        await stand_by(
            config,
            store,
            lambda serve: coordinator(
                config,
                store,
                trainers={address: TrainerClient(to[address]) for address in config.trainers},
                samplers={address: SamplerClient(to[address]) for address in config.samplers},
                reward=RewardClient(to[config.reward]),
                environments=EnvironmentClient(to[config.reward]),
                load_tokenizer=load,
                play=playing,
                serve=serve,
            ),
        )


if __name__ == "__main__":
    main()

"""The sampler: `python -m services.sampler --config FILE`."""

# ruff: noqa: PLC0415 - a mistake in the configuration is told before anything heavy is imported

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
from typing import TYPE_CHECKING

from rollmesh.config import from_command_line, run
from rollmesh.telemetry import log_fields, telemetry
from services.sampler.backends import BrokenInstallationError, choose, explained
from services.sampler.config import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from rollmesh.rpc.server import Serving
    from rollmesh.types import AdapterSource
    from services.sampler.adapters import Part
    from services.sampler.backends.base import Backend
    from services.sampler.engine import Sampler

log = logging.getLogger("services.sampler")


class EngineDiedError(Exception):
    """The engine cannot be had back in this process; a supervisor starts another."""


def main() -> None:
    """Read the configuration, then serve until told to end."""
    config = from_command_line(SamplerConfig, "services.sampler")
    with telemetry("sampler", config.telemetry):
        try:
            backend = choose(config)
        except BrokenInstallationError as error:
            log.critical("%s", error)
            sys.exit(1)
        try:
            run(serve(config, backend))
        except* EngineDiedError as group:
            log.critical("%s", group.exceptions[0])
            sys.exit(1)


async def serve(config: SamplerConfig, backend: Backend) -> None:
    """Serve until the process is told to end, or the engine dies."""
    from rollmesh.api.sampler.v1 import sampler_service_pb2 as pb
    from rollmesh.api.sampler.v1.sampler_service_pb2_grpc import (
        add_SamplerServiceServicer_to_server,
    )
    from rollmesh.rpc.server import serving, terminated
    from services.sampler.adapters import Adapters
    from services.sampler.cache import cache_folder
    from services.sampler.engine import Sampler
    from services.sampler.servicer import SamplerServicer

    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(cache_folder(config.cache_dir))
        stack.push_async_callback(backend.stop)
        adapters = Adapters(
            backend,
            pull,
            folder,
            base_model=config.base_model.name,
            max_rank=config.max_rank,
            max_versions=config.max_versions,
        )
        await stack.enter_async_context(adapters)
        sampler = Sampler(
            backend,
            adapters,
            base_model=config.base_model.name,
            max_rank=config.max_rank,
            max_queued=config.max_queued,
            chunk_tokens=config.chunk_tokens,
            new_seed=lambda: secrets.randbits(63),
        )
        running = await stack.enter_async_context(
            serving(
                lambda server: add_SamplerServiceServicer_to_server(
                    SamplerServicer(sampler), server
                ),
                services=[pb.DESCRIPTOR.services_by_name["SamplerService"].full_name],
                address=config.listen,
                drain_s=config.drain_s,
            )
        )
        async with asyncio.TaskGroup() as tasks:
            life = tasks.create_task(live(sampler, running))
            await terminated()
            life.cancel()


async def live(sampler: Sampler, running: Serving) -> None:
    """Start the engine, report SERVING, and raise EngineDiedError when it is dead."""
    try:
        await sampler.start()
    except Exception as error:  # an engine's start can fail in any way
        log.exception("the engine did not start")
        raise EngineDiedError(f"the engine did not start: {explained(error)}") from error
    await running.ready()
    with log_fields(port=running.port):
        log.info("serving")
    raise EngineDiedError(await sampler.failure())


async def pull(source: AdapterSource) -> AsyncGenerator[Part, None]:
    """A version from its trainer. A connection made anew costs little beside a training step."""
    from rollmesh.client import TrainerClient
    from rollmesh.rpc.channel import channel

    async with channel(source.trainer_address) as opened:
        parts = TrainerClient(opened).export_adapter(source.adapter, source.policy_version)
        async for part in parts:
            yield part


if __name__ == "__main__":
    main()

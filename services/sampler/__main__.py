"""The sampler: `python -m services.sampler --config FILE`."""

# ruff: noqa: PLC0415 - a mistake in the configuration is told before anything heavy is imported

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
import time
from typing import TYPE_CHECKING

from rollmesh.config import from_command_line, run
from rollmesh.telemetry import log_fields, telemetry
from services.sampler.backends import BrokenInstallationError, choose, explained
from services.sampler.config import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from rollmesh.rpc.server import Serving
    from rollmesh.types import AdapterSource
    from services.sampler.backends.base import Backend
    from services.sampler.download import Part
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
    from rollmesh.blobs import Blobs
    from rollmesh.rpc.server import serving, terminated
    from services.sampler.adapters import Adapters
    from services.sampler.cache import cache_folder
    from services.sampler.engine import Sampler
    from services.sampler.servicer import SamplerServicer
    from services.sampler.slots import Slots
    from services.sampler.transfer import Sources

    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(cache_folder(config.cache_dir, config.max_cache))
        stack.push_async_callback(backend.stop)
        slots = Slots(
            backend,
            quantum_s=config.quantum_s,
            kv_overcommit=config.kv_overcommit,
            max_completions=config.max_num_seqs,
        )
        adapters = Adapters(
            Sources(trainer_parts, Blobs(config.blobs) if config.blobs else None).pull,
            folder,
            release=slots.forget,
            base_model=config.base_model.name,
            max_rank=config.max_rank,
            max_versions=config.max_versions,
            max_bytes=config.max_cache,
        )
        # At the end what they free is no more than files.
        await stack.enter_async_context(adapters)
        await stack.enter_async_context(slots)
        sampler = Sampler(
            backend,
            adapters,
            slots,
            # Of this process alone: the next one at this address has none of its state.
            instance_id=secrets.token_hex(8),
            base_model=config.base_model.name,
            max_rank=config.max_rank,
            max_queued=config.max_queued,
            chunk_tokens=config.chunk_tokens,
            new_seed=lambda: secrets.randbits(63),
            clock=time.monotonic,
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
            ends_at = asyncio.get_running_loop().time() + config.drain_s
            await running.not_ready()
            # It goes on to answer, so that the coordinator learns why and gives it nothing more.
            await sampler.drained(config.drain_s)
            await running.stop(max(ends_at - asyncio.get_running_loop().time(), 0.0))
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


async def trainer_parts(source: AdapterSource, offset: int) -> AsyncGenerator[Part, None]:
    """A version from its trainer. A connection made anew costs little beside a training step."""
    from rollmesh.client import TrainerClient
    from rollmesh.rpc.channel import channel

    async with channel(source.trainer_address) as opened:
        parts = TrainerClient(opened).export_adapter(
            source.adapter, source.policy_version, offset=offset
        )
        async with contextlib.aclosing(parts):
            async for part in parts:
                yield part


if __name__ == "__main__":
    main()

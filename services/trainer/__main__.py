"""The trainer service: `python -m services.trainer --config FILE`."""

# ruff: noqa: PLC0415 - a mistake in the configuration is told before anything heavy is imported

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import uuid

from rollmesh.config import from_command_line, run
from services.trainer.config import TrainerConfig

log = logging.getLogger("services.trainer")


def main() -> None:
    """Read the configuration, then serve until told to end."""
    config = from_command_line(TrainerConfig, "services.trainer")
    # Read when torch is loaded. Threads that spin while they wait for each other slow every process
    # of a shared machine down, this one most: passes took up to 20 times as long beside a sampler.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run(serve(config))


async def serve(config: TrainerConfig) -> None:
    """Serve until the process is told to end.

    Raises:
        InvalidRequest: the base model cannot be loaded.
    """
    from rollmesh.api.trainer.v1 import trainer_service_pb2 as pb
    from rollmesh.api.trainer.v1.trainer_service_pb2_grpc import (
        add_TrainerServiceServicer_to_server,
    )
    from rollmesh.blobs import Blobs
    from rollmesh.rpc.server import serving, terminated
    from rollmesh.telemetry import log_fields, telemetry
    from services.trainer.adapters import Adapters
    from services.trainer.engine import Engine
    from services.trainer.exports import Exports
    from services.trainer.model import load
    from services.trainer.servicer import TrainerServicer
    from services.trainer.snapshots import Snapshots
    from services.trainer.uninterrupted import Uninterrupted

    with telemetry("trainer", config.telemetry):
        async with contextlib.AsyncExitStack() as stack:
            loop = asyncio.get_running_loop()
            ends_at = loop.time()
            blobs = Blobs(config.blobs)
            model = load(config)
            engine = Engine(
                model,
                max_queued_ops=config.max_queued_ops,
                # Without its thread it is of no use to anybody; its successor will be.
                broken=lambda: os.kill(os.getpid(), signal.SIGTERM),
            )
            stack.callback(engine.close)
            snapshots = Snapshots(
                blobs,
                model.lora,
                base_model=config.base_model.name,
                new_id=lambda: uuid.uuid4().hex,
                max_queued=config.max_queued_ops,
            )
            stack.callback(snapshots.close)
            exports = Exports(blobs, new_id=lambda: uuid.uuid4().hex)
            uninterrupted = await stack.enter_async_context(Uninterrupted())
            # Before that, for a publish may wait for others to be written.
            stack.push_async_callback(lambda: exports.close(ends_at - loop.time()))
            # After drain_s, and before all of the above: an op that outlived it ends before its
            # next pass.
            stack.callback(model.stop)
            adapters = Adapters(
                model,
                engine,
                snapshots,
                exports,
                uninterrupted,
                base_model=config.base_model.name,
                max_rank=config.max_rank,
                max_adapters=config.max_adapters,
                max_adapter_bytes=config.max_adapter_bytes,
                kept_versions=config.kept_versions,
                max_queued_ops=config.max_queued_ops,
                instance_id=uuid.uuid4().hex,
            )
            running = await stack.enter_async_context(
                serving(
                    lambda server: add_TrainerServiceServicer_to_server(
                        TrainerServicer(adapters), server
                    ),
                    services=[pb.DESCRIPTOR.services_by_name["TrainerService"].full_name],
                    address=config.listen,
                    drain_s=config.drain_s / 2,
                )
            )
            await running.ready()
            with log_fields(port=running.port):
                log.info("serving")
            await terminated()
            ends_at = loop.time() + config.drain_s
            await adapters.moved_away(config.drain_s / 2)


if __name__ == "__main__":
    main()

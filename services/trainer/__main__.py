"""The trainer service: `python -m services.trainer --config FILE`."""

# ruff: noqa: PLC0415 - a mistake in the configuration is told before anything heavy is imported

from __future__ import annotations

import contextlib
import logging
import os

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
    from rollmesh.rpc.server import serving, terminated
    from rollmesh.telemetry import log_fields, telemetry
    from services.trainer.adapters import Adapters
    from services.trainer.engine import Engine
    from services.trainer.model import load
    from services.trainer.servicer import TrainerServicer

    with telemetry("trainer", config.telemetry), contextlib.ExitStack() as stack:
        model = load(config)
        adapters = Adapters(
            model,
            base_model=config.base_model.name,
            max_rank=config.max_rank,
            max_adapters=config.max_adapters,
            kept_versions=config.kept_versions,
        )
        engine = Engine(max_queued_ops=config.max_queued_ops)
        # Last of all: an op that outlived drain_s ends before its next pass.
        stack.callback(engine.close)
        stack.callback(model.stop)
        async with serving(
            lambda server: add_TrainerServiceServicer_to_server(
                TrainerServicer(adapters, engine), server
            ),
            services=[pb.DESCRIPTOR.services_by_name["TrainerService"].full_name],
            address=config.listen,
            drain_s=config.drain_s,
        ) as running:
            await running.ready()
            with log_fields(port=running.port):
                log.info("serving")
            await terminated()


if __name__ == "__main__":
    main()

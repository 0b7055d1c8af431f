"""The coordinator's gRPC services: convert, one call of a core, convert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.api.coordinator.v1 import (
    adapter_service_pb2,
    checkpoint_service_pb2,
    fleet_service_pb2,
    future_service_pb2,
    job_service_pb2,
    key_service_pb2,
    record_service_pb2,
    sampling_service_pb2,
    sweep_service_pb2,
    training_service_pb2,
)
from rollmesh.api.coordinator.v1.adapter_service_pb2_grpc import (
    add_AdapterServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.checkpoint_service_pb2_grpc import (
    add_CheckpointServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.fleet_service_pb2_grpc import add_FleetServiceServicer_to_server
from rollmesh.api.coordinator.v1.future_service_pb2_grpc import (
    add_FutureServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.job_service_pb2_grpc import add_JobServiceServicer_to_server
from rollmesh.api.coordinator.v1.key_service_pb2_grpc import add_KeyServiceServicer_to_server
from rollmesh.api.coordinator.v1.record_service_pb2_grpc import (
    add_RecordServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.sampling_service_pb2_grpc import (
    add_SamplingServiceServicer_to_server,
)
from rollmesh.api.coordinator.v1.sweep_service_pb2_grpc import add_SweepServiceServicer_to_server
from rollmesh.api.coordinator.v1.training_service_pb2_grpc import (
    add_TrainingServiceServicer_to_server,
)
from services.coordinator.servicers.adapters import AdapterServicer
from services.coordinator.servicers.checkpoints import CheckpointServicer
from services.coordinator.servicers.fleet import FleetServicer
from services.coordinator.servicers.futures import FutureServicer
from services.coordinator.servicers.jobs import JobServicer
from services.coordinator.servicers.keys import KeyServicer
from services.coordinator.servicers.records import RecordServicer
from services.coordinator.servicers.sampling import SamplingServicer
from services.coordinator.servicers.sweeps import SweepServicer
from services.coordinator.servicers.training import TrainingServicer

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from rollmesh import types
    from services.coordinator.adapters import Adapters
    from services.coordinator.checkpoints import Checkpoints
    from services.coordinator.explaining import Explaining
    from services.coordinator.futures import Futures
    from services.coordinator.jobs import Jobs
    from services.coordinator.keys import Keys
    from services.coordinator.leases import Leases
    from services.coordinator.policies import Policies
    from services.coordinator.records import Records
    from services.coordinator.sweeps import Sweeps

    Register = Callable[[grpc.aio.Server], None]

SERVICES = tuple(
    service.full_name
    for module in (
        adapter_service_pb2,
        checkpoint_service_pb2,
        fleet_service_pb2,
        future_service_pb2,
        job_service_pb2,
        key_service_pb2,
        record_service_pb2,
        sampling_service_pb2,
        sweep_service_pb2,
        training_service_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
)
"""Full names of all."""


def register(
    jobs: Jobs,
    sweeps: Sweeps,
    adapters: Adapters,
    checkpoints: Checkpoints,
    policies: Policies,
    leases: Leases,
    snapshot: Callable[[], types.Fleet],
    explaining: Explaining,
    records: Records,
    keys: Keys,
    futures: Futures,
) -> Register:
    """What adds the services over these cores to a server."""

    def add(server: grpc.aio.Server) -> None:
        add_JobServiceServicer_to_server(JobServicer(jobs), server)
        add_SweepServiceServicer_to_server(SweepServicer(sweeps), server)
        add_AdapterServiceServicer_to_server(AdapterServicer(adapters, checkpoints), server)
        add_CheckpointServiceServicer_to_server(CheckpointServicer(checkpoints), server)
        add_TrainingServiceServicer_to_server(TrainingServicer(adapters, checkpoints), server)
        add_SamplingServiceServicer_to_server(SamplingServicer(policies, leases), server)
        add_FleetServiceServicer_to_server(FleetServicer(snapshot, explaining), server)
        add_RecordServiceServicer_to_server(RecordServicer(records), server)
        add_KeyServiceServicer_to_server(KeyServicer(keys), server)
        add_FutureServiceServicer_to_server(FutureServicer(futures), server)

    return add

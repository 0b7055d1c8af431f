"""Work of futures as messages, and the queues that do it without gRPC; they can die anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rollmesh import convert, types
from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.convert.values import duration_to_pb
from services.coordinator.bodies import Bodies
from services.coordinator.checkpoints import Checkpoints
from services.coordinator.future_queues import Queues
from services.coordinator.future_work import Waits
from services.coordinator.leases import Leases
from services.coordinator.servicers.work import MessageWorks
from services.coordinator.store import Changes
from tests.fakes.mesh import BASE_MODEL
from tests.fakes.training import Life, Mortal, running_core

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rollmesh.blobs import Blobs
    from services.coordinator.store import Store
    from tests.fakes.mesh import FakeTrainer

P = "projects/p"
A = f"{P}/adapters/a"


def create_work(adapter: str = A) -> pb.Work:
    work = pb.Work()
    work.create_adapter.name = adapter
    work.create_adapter.base_model = BASE_MODEL
    work.create_adapter.lora.rank = 4
    return work


def batch_work(number: int = 1, length: int = 2, adapter: str = A) -> pb.Work:
    tokens = np.full(length, number, np.int32)
    work = pb.Work()
    work.forward_backward.adapter = adapter
    work.forward_backward.data.append(convert.datum_to_pb(types.Datum(tokens, tokens)))
    loss = types.LossConfig("cross_entropy")
    work.forward_backward.loss_config.CopyFrom(convert.loss_to_pb(loss))
    return work


def forward_work(adapter: str = A) -> pb.Work:
    work = pb.Work()
    work.forward.adapter = adapter
    work.forward.data.extend(batch_work().forward_backward.data)
    return work


def step_work(rate: float = 0.1, adapter: str = A) -> pb.Work:
    work = pb.Work()
    work.optim_step.adapter = adapter
    work.optim_step.adam.CopyFrom(convert.adam_to_pb(types.AdamConfig(learning_rate=rate)))
    return work


def load_work(checkpoint: str, adapter: str = A) -> pb.Work:
    work = pb.Work()
    work.load_checkpoint.adapter = adapter
    work.load_checkpoint.checkpoint = checkpoint
    return work


def fork_work(checkpoint: str) -> pb.Work:
    work = pb.Work()
    work.fork_adapter.name = f"{P}/adapters/b"
    work.fork_adapter.checkpoint = checkpoint
    return work


def keep_work(
    *, checkpoint: str = "", publish: bool = True, lease_s: float = 60.0, adapter: str = A
) -> pb.Work:
    work = pb.Work(keep=pb.Keep(adapter=adapter, publish=publish, checkpoint=checkpoint))
    if lease_s:
        work.keep.lease_ttl.CopyFrom(duration_to_pb(lease_s))
    return work


def refused_work(message: str = "no such loss") -> pb.Work:
    metadata = {"field": "loss_fn"}
    failure = pb.Failure(reason="INVALID_REQUEST", message=message, metadata=metadata)
    return pb.Work(refused=failure)


def sample_work(
    prompt: tuple[int, ...] = (1, 2),
    count: int = 1,
    policy: types.PolicyRef | None = None,
    project: str = P,
) -> pb.Work:
    work = pb.Work()
    work.sample.project = project
    policy = policy or types.PolicyRef(base_model=BASE_MODEL)
    work.sample.policy.CopyFrom(convert.policy_to_pb(policy))
    work.sample.prompt_token_ids.extend(prompt)
    work.sample.num_completions = count
    return work


@contextlib.asynccontextmanager
async def running_queues(
    store: Store, blobs: Blobs, trainer: FakeTrainer, life: Life | None = None
) -> AsyncIterator[tuple[Queues, Bodies, Any, Changes]]:
    """Queues that work, bodies and the store to put work into, and who hears what is done.

    All die with the block, or by `life` before.
    """
    life = life or Life()
    changes = Changes()
    futures: Any = Mortal(store.futures, life)
    bodies: Any = Mortal(Bodies(blobs, "futures", new_id=lambda: secrets.token_hex(16)), life)
    async with running_core(store, blobs, {"t:1": trainer}, life) as core:
        checkpoints = Checkpoints(
            cast("Any", Mortal(store.checkpoints, life)),
            core,
            store.adapters,
            blobs,
            clock=time.time,
        )
        leases = Leases(
            cast("Any", Mortal(store.leases, life)),
            core,
            max_leases=1000,
            clock=time.time,
            new_id=lambda: f"lease-{secrets.token_hex(8)}",
        )
        works: Any = MessageWorks(core, checkpoints, cast("Any", None), leases)

        async def next_sequence(adapter: str) -> int:
            return (await core.get_adapter(adapter)).next_sequence

        queues = Queues(
            futures,
            bodies,
            works,
            next_sequence=next_sequence,
            changes=changes,
            waits=Waits(time.time),
            clock=time.time,
        )
        running = asyncio.ensure_future(queues.run())
        try:
            yield queues, bodies, futures, changes
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

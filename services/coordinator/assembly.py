"""The coordinator's parts put together, whatever trainers, samplers and rewards they talk to."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from functools import partial
from typing import TYPE_CHECKING

from rollmesh.blobs import Blobs
from rollmesh.convert import journal as codec
from rollmesh.rpc.server import serving
from services.coordinator.adapters import Adapters, Durability
from services.coordinator.admission import Admission
from services.coordinator.base_models import BaseModels
from services.coordinator.bodies import Bodies
from services.coordinator.checkpoints import Checkpoints
from services.coordinator.checks import Checks
from services.coordinator.explaining import Explaining
from services.coordinator.fleet.static import StaticFleet
from services.coordinator.future_queues import Queues
from services.coordinator.future_samples import SampleBounds, Samples
from services.coordinator.future_work import Waits
from services.coordinator.futures import Futures
from services.coordinator.jobs import Jobs
from services.coordinator.journal import Journal
from services.coordinator.keys import Keys
from services.coordinator.leases import Leases
from services.coordinator.makers import Peers
from services.coordinator.newest import Publications
from services.coordinator.policies import Policies
from services.coordinator.projects import projects_of
from services.coordinator.pruning import Pruning
from services.coordinator.records import Records
from services.coordinator.retention import Retention
from services.coordinator.runner import Runner
from services.coordinator.sampling import FleetSampling
from services.coordinator.scheduler import Scheduler
from services.coordinator.servicers import SERVICES, register
from services.coordinator.servicers.work import MessageWorks
from services.coordinator.store import Changes
from services.coordinator.sweeper import Sweeper
from services.coordinator.sweeps import Halver, Sweeps
from services.coordinator.usage import UsageKeeper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from rollmesh import types
    from rollmesh.rpc.server import Serving
    from services.coordinator.config import CoordinatorConfig
    from services.coordinator.future_work import Works
    from services.coordinator.ports import (
        EnvironmentPort,
        RewardPort,
        SamplerPort,
        Tokenizer,
        TrainerPort,
    )
    from services.coordinator.runner import Play
    from services.coordinator.servicers import Register
    from services.coordinator.store import Store

    Serve = Callable[[Register], contextlib.AbstractAsyncContextManager[Serving]]

_SWEEP_EVERY_S = 60.0


@contextlib.asynccontextmanager
async def coordinator(
    config: CoordinatorConfig,
    store: Store,
    *,
    trainers: Mapping[str, TrainerPort],
    samplers: Mapping[str, SamplerPort],
    reward: RewardPort,
    environments: EnvironmentPort,
    load_tokenizer: Callable[[str], Tokenizer],
    play: Callable[[Peers], Play],
    serve: Serve | None = None,
) -> AsyncIterator[Serving]:
    """A coordinator that serves and runs jobs until the block ends.

    Then jobs stop where they are, for a successor to go on with; watchers are sent away, and other
    calls get config.drain_s to finish. Ports are by address; `play` makes the loop of all jobs;
    `load_tokenizer` reads that of a base model, and may block.
    `serve`: where a server runs already, None: one at config.listen.
    """
    serve = serve or partial(
        serving, services=SERVICES, address=config.listen, drain_s=config.drain_s
    )
    fleet = StaticFleet(trainers=trainers, samplers=samplers, rewards={config.reward: reward})
    projects = projects_of(config)
    scheduler = Scheduler(
        max_running_completions=config.max_running_completions,
        max_queued_requests=config.max_queued_requests,
        projects=projects,
        prompt_token_price=config.prompt_token_price,
    )
    sampling = FleetSampling(
        fleet,
        scheduler,
        locate=lambda source: adapters.locate(source),  # noqa: PLW0108 - they are made below
        new_seed=lambda: secrets.randbits(48),
        clock=time.time,
    )
    usage = UsageKeeper(store.usage, scheduler, dispatch=sampling.dispatch, clock=time.time)
    base_models = BaseModels(fleet, [model.name for model in config.base_models])
    blobs = Blobs(config.blobs_url)
    journal = Journal(
        store.ops, blobs, codec, clock=time.time, new_id=lambda: secrets.token_hex(16)
    )
    publications = Publications()
    adapters = Adapters(
        store,
        journal,
        fleet,
        trainers,
        sampling,
        base_models=base_models,
        publications=publications,
        blobs=blobs,
        durability=Durability(
            trainer_lease_s=config.trainer_lease_s,
            snapshot_every_ops=config.snapshot_every_ops,
            snapshot_every_bytes=config.snapshot_every_bytes,
            result_retention_s=config.result_retention_s,
        ),
        max_adapters=lambda project: projects.of(project).max_adapters,
        clock=time.time,
    )
    checkpoints = Checkpoints(store.checkpoints, adapters, store.adapters, blobs, clock=time.time)
    leases = Leases(
        store.leases,
        adapters,
        max_leases=config.max_leases,
        clock=time.time,
        new_id=lambda: f"lease-{secrets.token_hex(8)}",
    )
    retention = Retention(
        store.versions,
        store.leases,
        sampling,
        blobs,
        retention_s=config.version_retention_s,
        max_superseded=config.max_superseded_versions,
        clock=time.time,
    )
    pruning = Pruning(
        store.events,
        store.groups,
        store.records,
        store.futures,
        event_retention_s=config.event_retention_s,
        rollout_retention_s=config.rollout_retention_s,
        result_retention_s=config.result_retention_s,
        request_retention_s=config.request_retention_s,
        clock=time.time,
    )
    sweeper = Sweeper(
        store.references,
        store.checkpoints,
        adapters,
        blobs,
        interval_s=_SWEEP_EVERY_S,
        clock=time.time,
    )
    admission = Admission(
        fleet, projects, scheduler, store.adapters, max_running=config.max_running_jobs
    )
    jobs = Jobs(
        store.jobs,
        fleet,
        environments,
        base_models=base_models,
        checks=Checks(fleet, base_models, adapters, reward, environments, load_tokenizer),
        projects=projects,
        queue=admission.status,
        problems=lambda job: runner.problems(job),  # noqa: PLW0108 - it is made below
        max_pending=config.max_pending_jobs,
        clock=time.time,
        new_id=lambda: f"job-{secrets.token_hex(4)}",
    )
    sweeps = Sweeps(
        store.sweeps,
        jobs,
        max_pending=config.max_pending_jobs,
        clock=time.time,
        new_id=lambda: f"sweep-{secrets.token_hex(4)}",
    )
    halver = Halver(store.sweeps, store.jobs.changes, clock=time.time)
    runner = Runner(
        store.jobs,
        store.groups,
        fleet,
        adapters,
        play(Peers(adapters, sampling, reward, environments, checkpoints, load_tokenizer)),
        admission,
        clock=time.time,
    )
    policies = Policies(adapters, sampling, publications, projects)
    futures = _futures(
        config,
        store,
        blobs,
        MessageWorks(adapters, checkpoints, policies, leases),
        adapters,
        scheduler,
    )
    services = register(
        jobs,
        sweeps,
        adapters,
        checkpoints,
        policies,
        leases,
        lambda: fleet.snapshot(sampling.num_queued_requests),
        Explaining(scheduler, admission, store.jobs, store.adapters, projects, clock=time.time),
        Records(store.records, max_records=config.max_records, clock=time.time),
        Keys(
            store.keys,
            max_keys=config.max_keys,
            clock=time.time,
            new_id=lambda: f"key-{secrets.token_hex(8)}",
            new_secret=lambda: f"tml-{secrets.token_urlsafe(32)}",
        ),
        futures,
    )
    await store.adapters.none_is_being_made()
    await usage.restore()
    async with contextlib.AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        for part in (fleet, adapters, retention, pruning, sweeper, usage):
            stack.callback(tasks.create_task(part.run()).cancel)
        server = await stack.enter_async_context(serve(services))
        stack.callback(store.jobs.changes.close)
        stack.callback(futures.close)
        stack.callback(tasks.create_task(futures.run()).cancel)
        stack.callback(tasks.create_task(halver.run()).cancel)
        stack.callback(tasks.create_task(runner.run()).cancel)
        stack.push_async_callback(server.not_ready)
        await server.ready()
        yield server


def _futures(
    config: CoordinatorConfig,
    store: Store,
    blobs: Blobs,
    works: Works,
    adapters: Adapters,
    scheduler: Scheduler,
) -> Futures:
    changes, waits = Changes(), Waits(time.time)
    bodies = Bodies(blobs, "futures", new_id=lambda: secrets.token_hex(16))

    async def next_sequence(adapter: str) -> int:
        return (await adapters.get_adapter(adapter)).next_sequence

    def why(project: str, subject: str) -> types.Waiting | None:
        return next(iter(scheduler.explain(project, subject, time.time()).waiting), None)

    queues = Queues(
        store.futures,
        bodies,
        works,
        next_sequence=next_sequence,
        changes=changes,
        waits=waits,
        clock=time.time,
    )
    samples = Samples(
        works,
        why,
        changes=changes,
        waits=waits,
        bounds=SampleBounds(
            max_begun=config.max_queued_requests,
            max_of_project=config.max_futures,
            max_of_all=config.max_sampling_futures,
            project_bytes=config.max_project_sampling_bytes,
            all_bytes=config.max_sampling_bytes,
            retention_s=config.result_retention_s,
        ),
        clock=time.time,
    )
    return Futures(
        store.futures,
        bodies,
        queues,
        samples,
        changes=changes,
        waits=waits,
        max_unfinished=config.max_futures,
        retention_s=config.result_retention_s,
        clock=time.time,
    )

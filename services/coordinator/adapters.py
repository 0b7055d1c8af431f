"""Adapters for their users and for the loops of jobs: the core of two of the services.

An adapter lives on one trainer at a time. What a job owns the job alone trains, until the job has
ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import (
    FailedPrecondition,
    InvalidRequest,
    MeshError,
    NotFound,
    Unavailable,
)
from rollmesh.names import parse_adapter, parse_project
from services.coordinator.delivery import Delivery
from services.coordinator.exporting import export
from services.coordinator.making import make
from services.coordinator.ownership import Ownership
from services.coordinator.paging import page_size_of
from services.coordinator.recovery import Recovery
from services.coordinator.snapshots import Snapshots
from services.coordinator.store import Origin, Request, check_free
from services.coordinator.time_to_live import USE_NOTED_EVERY_S, check_ttl
from services.coordinator.turns import Turns
from services.coordinator.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from rollmesh.blobs import Blobs
    from services.coordinator.base_models import BaseModels
    from services.coordinator.fleet.membership import Fleet
    from services.coordinator.journal import Journal
    from services.coordinator.newest import Publications
    from services.coordinator.ports import Sampling, TrainerPort
    from services.coordinator.store import Store, StoredAdapter

MAX_WAITING = 64
"""Calls that wait for one adapter."""
_DELETE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Durability:
    """Settings of the same names in CoordinatorConfig."""

    trainer_lease_s: float
    snapshot_every_ops: int
    snapshot_every_bytes: int
    result_retention_s: float


class Adapters:
    """The adapters of all projects; fulfils ports.Training.

    Args:
        store: where they are written down.
        journal: their ops.
        fleet: which trainers may have them.
        trainers: every configured trainer by address, serving or not.
        sampling: what is told to forget a deleted adapter.
        base_models: those that the mesh knows.
        publications: what hears of new versions.
        blobs: where their trainers write them.
        durability: settings.
        max_adapters: of a project, by its id; None: no bound.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: Store,
        journal: Journal,
        fleet: Fleet,
        trainers: Mapping[str, TrainerPort],
        sampling: Sampling,
        *,
        base_models: BaseModels,
        publications: Publications,
        blobs: Blobs,
        durability: Durability,
        max_adapters: Callable[[str], int | None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store.adapters
        self._max_adapters = max_adapters
        self._versions = store.versions
        self._trainers = trainers
        self._sampling = sampling
        self._base_models = base_models
        self._publications = publications
        self._blobs = blobs
        self._clock = clock
        self._turns = Turns(max_waiting=MAX_WAITING)
        self._ownership = Ownership(fleet, lease_s=durability.trainer_lease_s)
        self._recovery = Recovery(
            store.adapters, store.versions, journal, self._ownership, trainers, clock=clock
        )
        self._snapshots = Snapshots(
            store.adapters,
            self._recovery,
            self._ownership,
            trainers,
            self._turns,
            every_ops=durability.snapshot_every_ops,
            every_bytes=durability.snapshot_every_bytes,
        )
        self._delivery = Delivery(journal, self._recovery, self._snapshots)
        self._upkeep = Upkeep(
            store.adapters,
            store.ops,
            fleet,
            self._ownership,
            self._recovery,
            self._delivery,
            self._snapshots,
            self._turns,
            result_retention_s=durability.result_retention_s,
            clock=clock,
        )

    async def run(self) -> None:
        """Keep adapters safe and where they belong, until cancelled, which ends what goes on."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._ownership.run())
                tasks.create_task(self._snapshots.run())
                tasks.create_task(self._upkeep.run())
        finally:
            await self._turns.close()

    async def create_adapter(
        self,
        name: str,
        base_model: str,
        lora: types.LoraConfig,
        *,
        job: str,
        request_id: str,
        num_versions: int = 1,
        idle_ttl_s: float | None = None,
        fork_of: types.Snapshot | None = None,
        with_optimizer: bool = False,
    ) -> types.Adapter:
        """A new adapter on the emptiest trainer; the one that `job` or the request made before.

        It is fresh, or begins with the weights of `fork_of`, and `with_optimizer` with the moments
        too; `lora` is then that of the snapshot. Its trainer keeps at least `num_versions` of its
        versions.

        Raises:
            InvalidRequest: the name, the base model, `idle_ttl_s` (seconds without use after which
                it is deleted; None: never), or what the trainers say of `lora`.
            AlreadyExists: the name or the request_id is taken.
            QuotaExceeded: the project has as many as it may.
            CapacityExhausted: no trainer has room.
            Unavailable: no trainer of the base model answers.
        """
        project, _ = parse_adapter(name)
        check_ttl(idle_ttl_s, field="idle_ttl")
        self._base_models.check(base_model, field="base_model", refusal=InvalidRequest)
        origin = None if fork_of is None else Origin(fork_of, with_optimizer)
        request = None
        if not job:
            content = [name, base_model, dataclasses.asdict(lora), idle_ttl_s]
            forked = None if origin is None else dataclasses.asdict(origin)
            request = Request.of(project, request_id, "CreateAdapter", *content, forked)

        async with self._turns.hold(name):
            stored = await self._store.reserve(
                name,
                base_model,
                lora,
                job=job,
                request=request,
                now=self._clock(),
                num_versions=num_versions,
                idle_ttl_s=idle_ttl_s,
                origin=origin,
                max_adapters=self._max_adapters(project),
            )
            if stored.ready:
                return stored.adapter
            try:
                made = await make(stored, self._store, self._ownership, clock=self._clock)
            except MeshError:
                await self._store.release(name)
                raise
            stored = await self._store.confirm(name, job=job, made=made)
            self._recovery.found(stored)
            return stored.adapter

    async def get_adapter(self, name: str) -> types.Adapter:
        """One adapter, as its ops left it, the last of which is settled before.

        Raises:
            NotFound: there is none of that name.
            Unavailable: that one's trainer is away.
        """
        parse_adapter(name)
        if not await self._delivery.has_tail(name):
            return (await self._existing(name)).adapter

        async def work() -> types.Adapter:
            await self._delivery.settle(name)
            return (await self._existing(name)).adapter

        return await self._turns.take(name, work)

    async def page(
        self, parent: str, page_size: int, page_token: str
    ) -> tuple[list[types.Adapter], str]:
        """Adapters of a project by name, as last seen, and the next page's token ("": none)."""
        project = parse_project(parent)
        size = page_size_of(page_size)
        found = await self._store.page(project, limit=size + 1, after=page_token)
        more = len(found) > size
        return found[:size], parse_adapter(found[size - 1].name)[1] if more else ""

    async def keep_idle(self, name: str, idle_ttl_s: float | None) -> None:
        """Keep an adapter for so many seconds from now or a later use on; None: for ever.

        Raises:
            NotFound: there is none of that name.
            InvalidRequest: the name or `idle_ttl_s`.
        """
        parse_adapter(name)
        check_ttl(idle_ttl_s, field="idle_ttl")
        await self._store.keep_idle(name, idle_ttl_s, now=self._clock())

    async def delete_adapter(self, name: str, *, request_id: str) -> None:
        """Delete an adapter with its versions, on its trainer and on every sampler.

        Where its trainer does not answer that holds a copy which nobody owns: `run` frees it later.
        """
        project, _ = parse_adapter(name)
        request = Request.of(project, request_id, "DeleteAdapter", name)

        async def work() -> None:
            if not await self._store.repeated(request):
                await self._delete(await self._store.get(name), request)

        await self._turns.take(name, work)

    async def delete_idle_adapter(self, name: str) -> None:
        """Delete an adapter that nobody used for its time to live.

        Raises:
            FailedPrecondition: somebody used it meanwhile, has a lease on a version of it, or a job
                that has not ended owns it.
        """

        async def work() -> None:
            stored = await self._store.get(name)
            ttl_s = stored.adapter.idle_ttl_s
            if ttl_s is None or self._clock() < stored.use_time + USE_NOTED_EVERY_S + ttl_s:
                raise FailedPrecondition(f"{name} is in use", resource=name)
            await self._delete(stored, None, unless_leased=True)

        await self._turns.take(name, work)

    async def _delete(
        self, stored: StoredAdapter, request: Request | None, *, unless_leased: bool = False
    ) -> None:
        name = stored.adapter.name
        check_free(stored)
        await self._store.delete(name, request, now=self._clock(), unless_leased=unless_leased)
        self._recovery.forget(name)
        self._snapshots.forget(name)
        self._publications.forget(name)
        if stored.trainer in self._trainers:
            with contextlib.suppress(MeshError, TimeoutError):
                async with asyncio.timeout(_DELETE_TIMEOUT_S):
                    trainer = self._trainers[stored.trainer]
                    await trainer.delete_adapter(name, epoch=stored.epoch)
        # Nobody waits for a sampler that does not answer: what it holds nobody asks for any more.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DELETE_TIMEOUT_S):
                await self._sampling.unload(stored.adapter.base_model, name, None)

    async def train(
        self, adapter: str, sequence: int, op: types.TrainingOp, *, job: str
    ) -> types.TrainingResult:
        """Run an op, exactly once; `job` or ("") an interactive client asks for it.

        Raises:
            NotFound: there is no such adapter.
            FailedPrecondition: another job owns it; it cannot be recovered; what the op needs.
            SequenceGap: the op is not the next.
            AlreadyExists: another op has its sequence.
            Unavailable: it may run or not; the same call again will tell.
            Overloaded: too much waits, here or at the trainer.
        """
        parse_adapter(adapter, field="adapter")
        return await self._turns.take(
            adapter, lambda: self._delivery.train(adapter, sequence, op, job=job)
        )

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
        *,
        job: str,
    ) -> types.ForwardBackwardResult:
        """Loss and gradients of a batch; see `train`."""
        op = types.ForwardBackward(data, loss_config)
        result = await self.train(adapter, sequence, op, job=job)
        assert isinstance(result, types.ForwardBackwardResult)  # noqa: S101 - what its op has
        return result

    async def forward(
        self,
        adapter: str,
        data: Sequence[types.Datum],
        *,
        temperature: float | None = None,
        loss_config: types.LossConfig | None = None,
    ) -> types.ForwardResult:
        """The targets' log-probabilities, with a loss its metrics too; all the project may ask."""

        async def ask() -> types.ForwardResult:
            stored = await self._at_home(adapter)
            async with self._ownership.call(stored.trainer):
                trainer = self._trainers[stored.trainer]
                return await trainer.forward(
                    adapter, data, temperature=temperature, loss_config=loss_config
                )

        try:
            return await ask()
        except NotFound:
            self._recovery.doubt(adapter)
            return await ask()

    async def optim_step(
        self, adapter: str, sequence: int, adam: types.AdamConfig, *, job: str
    ) -> types.OptimStepResult:
        """One AdamW step; see `train`."""
        result = await self.train(adapter, sequence, types.OptimStep(adam), job=job)
        assert isinstance(result, types.OptimStepResult)  # noqa: S101 - what its op has
        return result

    async def snapshot(self, adapter: str) -> tuple[StoredAdapter, types.Snapshot]:
        """A new snapshot of the adapter, with every op in it that was begun before.

        Raises:
            NotFound: there is no such adapter.
            FailedPrecondition: it cannot be recovered.
            Unavailable: its trainer or the blob store is away.
        """
        parse_adapter(adapter)

        async def work() -> tuple[StoredAdapter, types.Snapshot]:
            await self._delivery.settle(adapter)
            stored, snapshot = await self._snapshots.take(adapter)
            self._check_at(stored, stored.adapter.next_sequence, snapshot.next_sequence)
            return stored, snapshot

        return await self._turns.take(adapter, work)

    async def publish_adapter(
        self, name: str, *, with_pending_gradients: bool = False
    ) -> types.PublishedVersion:
        """Make the current weights a version that can be sampled and exported.

        Also `with_pending_gradients`, which stay pending and are no part of it.
        """
        parse_adapter(name)

        async def publish(stored: StoredAdapter, trainer: TrainerPort) -> types.PublishedVersion:
            return await trainer.publish_adapter(
                name, epoch=stored.epoch, with_pending_gradients=with_pending_gradients
            )

        async def work() -> types.PublishedVersion:
            await self._delivery.settle(name)
            stored, version = await self._recovery.call(name, publish)
            self._check_at(stored, stored.adapter.policy_version, version.policy_version)
            version = await self._versions.publish(name, version, now=self._clock())
            self._publications.announce(_source(name, version, stored.trainer))
            return version

        return await self._turns.take(name, work)

    def _check_at(self, stored: StoredAdapter, expected: int, found: int) -> None:
        """Refuse what the trainer has made of another state than that which the journal has.

        An op that the journal refused may have run there after all.
        """
        if found != expected:
            self._recovery.doubt(stored.adapter.name, diverged=True)
            raise Unavailable(
                f"{stored.adapter.name} is at {found} on its trainer and at {expected} in the "
                "journal; it is brought back",
                resource=stored.adapter.name,
            )

    async def export_adapter(
        self, name: str, policy_version: int | None
    ) -> AsyncGenerator[types.AdapterExport | bytes | str]:
        """A published version (None: the newest); see `exporting.export`.

        Raises:
            NotFound: no such adapter, or version that is kept.
        """
        stored = await self._at_home(name)
        version = await self._versions.get(name, policy_version)
        trainer = self._trainers[stored.trainer]
        exported = export(name, version, trainer, stored.trainer, self._blobs)
        async with contextlib.aclosing(exported) as parts:
            async for part in parts:
                yield part

    async def resolve(self, policy: types.PolicyRef) -> tuple[str, types.AdapterSource | None]:
        """Base model, and the published version with where it is; None: no adapter.

        Whoever has the answer is served though the version may be let go of the moment after: its
        blob stays for a while, and a sampler unloads nothing that a request uses.

        Raises:
            InvalidRequest: no policy, a version without an adapter, or another base model than
                the adapter's.
            NotFound: nobody serves the base model; no such adapter, or version that is kept.
        """
        if not policy.adapter:
            if policy.policy_version is not None:
                raise InvalidRequest(
                    "policy.policy_version: only an adapter has versions",
                    field="policy.policy_version",
                    value=policy.policy_version,
                )
            if not policy.base_model:
                raise InvalidRequest(
                    "policy.base_model: a policy names a base model or an adapter",
                    field="policy.base_model",
                )
            self._base_models.check(policy.base_model, field="policy.base_model", refusal=NotFound)
            return policy.base_model, None
        parse_adapter(policy.adapter, field="policy.adapter")
        stored = await self._store.get(policy.adapter)
        base_model = stored.adapter.base_model
        if policy.base_model not in {"", base_model}:
            raise InvalidRequest(
                f"policy.base_model: {policy.adapter} is on {base_model!r}, not on "
                f"{policy.base_model!r}",
                field="policy.base_model",
                value=policy.base_model,
                allowed=base_model,
            )
        version = await self._versions.get(policy.adapter, policy.policy_version)
        if self._clock() - stored.use_time >= USE_NOTED_EVERY_S:
            await self._store.touch(policy.adapter, now=self._clock())
        return base_model, _source(policy.adapter, version, stored.trainer)

    def locate(self, source: types.AdapterSource) -> types.AdapterSource:
        """The same version, where it is by now, as far as that is known."""
        name = source.adapter
        address = self._recovery.address(name) or source.trainer_address
        key = self._recovery.export_key(name, source.policy_version) or source.export_key
        return dataclasses.replace(source, trainer_address=address, export_key=key)

    async def _existing(self, name: str) -> StoredAdapter:
        parse_adapter(name)
        stored = await self._store.get(name)
        if not stored.ready:
            raise NotFound(f"there is no {name}", resource=name)
        return stored

    async def _at_home(self, name: str) -> StoredAdapter:
        """An adapter that exists, after it was recovered if need be."""
        stored = await self._existing(name)
        if self._recovery.is_current(stored):
            return stored
        return await self._turns.take(name, lambda: self._recovery.at_home(name))


def _source(
    name: str, version: types.PublishedVersion, trainer_address: str
) -> types.AdapterSource:
    return types.AdapterSource(
        name, version.policy_version, version.digest, trainer_address, version.export_key
    )

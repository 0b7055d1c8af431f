"""Adapters for their users and for the loops of jobs: the core of two of the services.

An adapter lives on one trainer. What a job owns the job alone trains, until the job has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import weakref
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import (
    DigestMismatch,
    FailedPrecondition,
    InvalidRequest,
    MeshError,
    NotFound,
    Unavailable,
)
from rollmesh.names import parse_adapter, parse_project
from services.coordinator.making import make
from services.coordinator.paging import page_size_of
from services.coordinator.store import Request, check_free

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

    from services.coordinator.base_models import BaseModels
    from services.coordinator.fleet.static import StaticFleet
    from services.coordinator.ports import Sampling, TrainerPort
    from services.coordinator.store import AdapterStore, StoredAdapter


class Adapters:
    """The adapters of all projects; fulfils ports.Training.

    Args:
        store: where they are written down.
        fleet: which trainers a new adapter may go to.
        trainers: every configured trainer by address, serving or not.
        sampling: what is told to forget a deleted adapter.
        base_models: those that the mesh knows.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: AdapterStore,
        fleet: StaticFleet,
        trainers: Mapping[str, TrainerPort],
        sampling: Sampling,
        *,
        base_models: BaseModels,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._trainers = trainers
        self._sampling = sampling
        self._base_models = base_models
        self._clock = clock
        # Creating and deleting one adapter exclude each other; a lock lives while somebody uses it.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def create_adapter(
        self,
        name: str,
        base_model: str,
        lora: types.LoraConfig,
        *,
        job: str,
        request_id: str,
        num_versions: int = 1,
    ) -> types.Adapter:
        """A fresh adapter on the emptiest trainer; the one that `job` or the request made before.

        The trainer keeps at least `num_versions` of its versions.

        Raises:
            InvalidRequest: the name, the base model, or what the trainers say of `lora`.
            AlreadyExists: the name or the request_id is taken.
            CapacityExhausted: no trainer has room.
            Unavailable: no trainer of the base model answers.
        """
        project, _ = parse_adapter(name)
        self._base_models.check(base_model, field="base_model", refusal=InvalidRequest)
        request = None
        if not job:
            content = (name, base_model, dataclasses.asdict(lora))
            request = Request.of(project, request_id, "CreateAdapter", *content)
        async with self._lock(name):
            stored = await self._store.reserve(
                name, base_model, lora, job=job, request=request, now=self._clock()
            )
            if stored.ready:
                return stored.adapter
            try:
                made = await make(
                    stored,
                    lora,
                    self._store,
                    self._fleet,
                    self._trainers,
                    num_versions=num_versions,
                )
            except MeshError:
                await self._store.release(name)
                raise
            return (await self._store.confirm(name, job=job, made=made)).adapter

    async def get_adapter(self, name: str) -> types.Adapter:
        """One adapter, as its trainer has it now."""
        stored, trainer = await self._on_trainer(name)
        with _lost(stored):
            held = await trainer.get_adapter(name)
        await self._store.seen(
            name, next_sequence=held.next_sequence, policy_version=held.policy_version
        )
        return dataclasses.replace(
            stored.adapter, policy_version=held.policy_version, next_sequence=held.next_sequence
        )

    async def page(
        self, parent: str, page_size: int, page_token: str
    ) -> tuple[list[types.Adapter], str]:
        """Adapters of a project by name, as last seen, and the next page's token ("": none)."""
        project = parse_project(parent)
        size = page_size_of(page_size)
        found = await self._store.page(project, limit=size + 1, after=page_token)
        more = len(found) > size
        return found[:size], parse_adapter(found[size - 1].name)[1] if more else ""

    async def delete_adapter(self, name: str, *, request_id: str) -> None:
        """Delete an adapter with its versions, on its trainer and on every sampler."""
        project, _ = parse_adapter(name)
        request = Request.of(project, request_id, "DeleteAdapter", name)
        async with self._lock(name):
            if await self._store.repeated(request):
                return
            stored = await self._store.get(name)
            check_free(stored)
            if stored.trainer in self._trainers:
                await self._trainers[stored.trainer].delete_adapter(name)
            await self._sampling.unload(stored.adapter.base_model, name, None)
            await self._store.delete(name, request, now=self._clock())

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
        *,
        job: str,
    ) -> types.ForwardBackwardResult:
        """Loss and gradients of a batch. FailedPrecondition: a job other than `job` owns it."""
        stored, trainer = await self._on_trainer(adapter)
        _check_owner(stored, job)
        with _lost(stored):
            result = await trainer.forward_backward(adapter, sequence, data, loss_config)
        await self._store.seen(adapter, next_sequence=sequence + 1)
        return result

    async def forward(
        self, adapter: str, data: Sequence[types.Datum]
    ) -> tuple[types.FloatArray, ...]:
        """Per datum the targets' log-probabilities; anybody in the project may ask."""
        stored, trainer = await self._on_trainer(adapter)
        with _lost(stored):
            return await trainer.forward(adapter, data)

    async def optim_step(
        self, adapter: str, sequence: int, adam: types.AdamConfig, *, job: str
    ) -> types.OptimStepResult:
        """One AdamW step. FailedPrecondition: a job other than `job` owns the adapter."""
        stored, trainer = await self._on_trainer(adapter)
        _check_owner(stored, job)
        with _lost(stored):
            result = await trainer.optim_step(adapter, sequence, adam)
        await self._store.seen(
            adapter, next_sequence=sequence + 1, policy_version=result.policy_version
        )
        return result

    async def publish_adapter(self, name: str) -> types.PublishedVersion:
        """Make the current weights a version that can be sampled and exported."""
        stored, trainer = await self._on_trainer(name)
        with _lost(stored):
            version = await trainer.publish_adapter(name)
        await self._store.publish(name, version, now=self._clock())
        return version

    async def export_adapter(
        self, name: str, policy_version: int | None
    ) -> AsyncGenerator[types.AdapterExport | bytes | str]:
        """A published version (None: the newest) as its trainer streams it.

        Raises:
            NotFound: no such version, or its trainer keeps it no longer.
            Unavailable: the stream was torn.
            DigestMismatch: the trainer sent something else than it had published.
        """
        stored, trainer = await self._on_trainer(name)
        version = await self._store.version(name, policy_version)
        digest = ""
        exported = trainer.export_adapter(name, version.policy_version)
        async with contextlib.aclosing(exported) as parts:
            async for part in parts:
                if isinstance(part, str):
                    digest = part
                    if digest != version.digest:
                        raise DigestMismatch(
                            f"version {version.policy_version} of {name} was published as "
                            f"{version.digest}, and {stored.trainer} sent {digest}",
                            resource=name,
                        )
                yield part
        if not digest:
            raise Unavailable(f"the trainer at {stored.trainer} stopped in the middle of {name}")

    async def resolve(self, policy: types.PolicyRef) -> tuple[str, types.AdapterSource | None]:
        """Base model, and the published version with its digest and trainer; None: no adapter.

        Raises:
            InvalidRequest: no policy, a version without an adapter, or another base model than
                the adapter's.
            NotFound: nobody serves the base model; no such adapter or published version.
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
        version = await self._store.version(policy.adapter, policy.policy_version)
        source = types.AdapterSource(
            policy.adapter, version.policy_version, version.digest, stored.trainer
        )
        return base_model, source

    async def _on_trainer(self, name: str) -> tuple[StoredAdapter, TrainerPort]:
        """An adapter that exists, and its trainer, whether that answers or not."""
        parse_adapter(name)
        stored = await self._store.get(name)
        if not stored.ready:
            raise NotFound(f"there is no {name}", resource=name)
        if stored.trainer not in self._trainers:
            raise FailedPrecondition(
                f"{name} is lost: the trainer at {stored.trainer}, which held it, is no part of "
                "this mesh any more",
                resource=name,
            )
        return stored, self._trainers[stored.trainer]

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _check_owner(stored: StoredAdapter, job: str) -> None:
    if stored.adapter.job != job:
        check_free(stored)
    if job and not (stored.owned and stored.adapter.job == job):
        raise FailedPrecondition(
            f"{job} has ended, or does not own {stored.adapter.name}",
            resource=stored.adapter.name,
            job=job,
        )


@contextlib.contextmanager
def _lost(stored: StoredAdapter) -> Iterator[None]:
    """A trainer that does not know an adapter which it had was restarted."""
    try:
        yield
    except NotFound as error:
        raise FailedPrecondition(
            f"{stored.adapter.name} is lost: its trainer at {stored.trainer} was restarted and "
            "does not hold it any more",
            resource=stored.adapter.name,
        ) from error

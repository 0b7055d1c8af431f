"""Checkpoints under the names that clients give them.

A name is free text to the mesh, so the coordinator's checkpoint has an id of its own, and a
document says which. A document has an entry for each time that the name was saved to; the newest
whose checkpoint the coordinator has is what the name stands for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rollmesh.api.coordinator.v1 import future_service_pb2 as pb
from rollmesh.convert.values import duration_to_pb
from rollmesh.errors import AlreadyExists, NotFound, Unavailable
from rollmesh.names import checkpoint_name, parse_checkpoint
from services.gateway.queues import run_key
from services.gateway.wire import bodies
from services.gateway.wire.ids import ModelId
from services.gateway.wire.paths import CheckpointPath, check_name
from services.gateway.wire.tickets import TrainTicket

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.types import Checkpoint
    from services.gateway.callers import Caller
    from services.gateway.config import GatewayConfig
    from services.gateway.documents import Document, Documents, Fields
    from services.gateway.ports import Mesh
    from services.gateway.queues import Queues
    from services.gateway.wire.paths import Kind

_MAX_ENTRIES = 64
"""Of a document: older ones are let go of."""
_ATTEMPTS = 8
NAMED_LEASE_S = 60.0
"""In which a sampling session of a new checkpoint finds its version where it was trained; later it
has the same weights from the checkpoint."""
_COMING_S = 60.0
"""How long after its entry the future of a save may come: the gateway that wrote the one down makes
the other next, or never."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a path stands for: its document, the entry of it, and the coordinator's checkpoint."""

    path: CheckpointPath
    document: Document
    entry: Fields
    checkpoint: Checkpoint


def checkpoint_key(path: CheckpointPath) -> str:
    """Key of its document."""
    return f"checkpoints/{path.model}/{path.checkpoint_id}"


def path_of(document: Document) -> CheckpointPath:
    """Whose document it is."""
    _, model, kind, name = document.key.split("/", 3)
    return CheckpointPath.of(ModelId.parse(model), kind, name)


class Checkpoints:
    """Makes and finds checkpoints. `clock`: Unix seconds."""

    def __init__(
        self,
        config: GatewayConfig,
        mesh: Mesh,
        documents: Documents,
        queues: Queues,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._documents = documents
        self._queues = queues
        self._clock = clock

    async def save(self, caller: Caller, body: bytes) -> dict[str, str]:
        """save_weights: the ticket."""
        place = bodies.parse(bodies.Sequenced, body)
        model = ModelId.parse(place.model_id)

        async def make() -> tuple[pb.Work, dict[str, Any]]:
            request = bodies.parse(bodies.SaveWeights, body)
            # Without a name it is the request's number, as it stands in its place of the order.
            name = request.path if request.path is not None else f"{place.seq_id:06d}"
            path = CheckpointPath.of(model, "weights", check_name(name))
            keep = await self._begin(
                caller,
                path,
                {
                    "seq": place.seq_id,
                    "ttl": request.ttl_seconds,
                    "user_metadata": request.user_metadata,
                },
                overwrite=request.overwrite,
            )
            return pb.Work(keep=keep), {"path": str(path)}

        return await self._queues.put(caller, model, place.seq_id, make)

    async def save_for_sampler(self, caller: Caller, body: bytes) -> dict[str, str]:
        """save_weights_for_sampler: the ticket."""
        place = bodies.parse(bodies.Sequenced, body)
        model = ModelId.parse(place.model_id)

        async def make() -> tuple[pb.Work, dict[str, Any]]:
            request = bodies.parse(bodies.SaveForSampler, body)
            lease = duration_to_pb(self._config.lease_ttl_s)
            if request.path is None:
                keep = pb.Keep(adapter=model.adapter(caller.project), publish=True, lease_ttl=lease)
                return pb.Work(keep=keep), {"sampler": request.kind}
            path = CheckpointPath.of(model, "sampler_weights", check_name(request.path))
            keep = await self._begin(
                caller,
                path,
                {
                    "seq": place.seq_id,
                    "ttl": request.ttl_seconds,
                    "user_metadata": request.user_metadata,
                },
                overwrite=True,
            )
            keep.publish = True
            keep.lease_ttl.CopyFrom(duration_to_pb(NAMED_LEASE_S))
            return pb.Work(keep=keep), {"path": str(path)}

        return await self._queues.put(caller, model, place.seq_id, make)

    async def save_external(self, caller: Caller, body: bytes) -> dict[str, str]:
        """save_weights_external: the ticket."""
        from services.gateway.encryption import check_recipients  # noqa: PLC0415

        place = bodies.parse(bodies.Sequenced, body)
        model = ModelId.parse(place.model_id)

        async def make() -> tuple[pb.Work, dict[str, Any]]:
            request = bodies.parse(bodies.SaveExternal, body)
            recipients = request.age_encryption_recipients or []
            check_recipients(recipients)
            path = CheckpointPath.of(model, "external_weights", check_name(request.path))
            keep = await self._begin(
                caller,
                path,
                {"seq": place.seq_id, "ttl": request.ttl_seconds, "recipients": recipients},
                overwrite=True,
            )
            return pb.Work(keep=keep), {"path": str(path)}

        return await self._queues.put(caller, model, place.seq_id, make)

    async def find(self, caller: Caller, path: CheckpointPath) -> Saved:
        """What a path stands for. NotFound: nothing."""
        document = await self._documents.find(caller.project, checkpoint_key(path))
        saved = await self._newest(document, path) if document else None
        if saved is None:
            raise NotFound(f"there is no checkpoint {path}", resource=path)
        return saved

    async def get(self, caller: Caller, path: CheckpointPath) -> Checkpoint:
        """The coordinator's checkpoint behind a path. NotFound: there is none."""
        return (await self.find(caller, path)).checkpoint

    async def shape(
        self, caller: Caller, path: CheckpointPath, checkpoint: Checkpoint
    ) -> dict[str, Any]:
        """What a run of these weights is, as its document says it."""
        run = await self._documents.find(caller.project, run_key(path.model))
        told = run.fields if run else {}
        return {
            "base_model": checkpoint.base_model,
            "rank": checkpoint.lora.rank,
            "seed": checkpoint.lora.seed,
            **{flag: told.get(flag, True) for flag in ("train_attn", "train_mlp", "train_unembed")},
        }

    async def settle(self, caller: Caller, path: CheckpointPath) -> None:
        """After a save has come to its end: let go of what it has replaced."""
        key = checkpoint_key(path)
        document = await self._documents.find(caller.project, key)
        saved = await self._newest(document, path) if document else None
        if saved is None:
            return
        last = saved.entry["seq"]
        older = [entry for entry in saved.document.fields["entries"] if entry["seq"] < last]
        for entry in older:
            await self._drop(entry["checkpoint"])
        if older:

            def without(fields: Fields) -> Fields:
                kept = [entry for entry in fields["entries"] if entry not in older]
                return {**fields, "entries": kept}

            await self._documents.change(caller.project, key, without)

    async def delete(self, caller: Caller, path: CheckpointPath) -> None:
        """Delete what a path stands for. NotFound: nothing."""
        saved = await self.find(caller, path)
        for entry in saved.document.fields["entries"]:
            await self._drop(entry["checkpoint"])
        await self._documents.delete(
            caller.project, saved.document.key, revision=saved.document.revision
        )

    async def set_public(self, caller: Caller, path: CheckpointPath, *, public: bool) -> None:
        """Publish, or take back. NotFound: there is no such checkpoint."""
        saved = await self.find(caller, path)
        await self._documents.change(
            caller.project, saved.document.key, lambda fields: {**fields, "public": public}
        )

    async def replace(self, caller: Caller, saved: Saved, copy: Checkpoint) -> None:
        """Have a path stand for a copy of what it stands for, which goes."""
        old = saved.entry["checkpoint"]

        def moved(fields: Fields) -> Fields:
            entries = [
                {**entry, "checkpoint": copy.name} if entry["checkpoint"] == old else entry
                for entry in fields["entries"]
            ]
            return {**fields, "entries": entries}

        await self._documents.change(caller.project, saved.document.key, moved)
        await self._drop(old)

    async def adopt(
        self, caller: Caller, path: CheckpointPath, copy: Checkpoint, like: Fields
    ) -> None:
        """Have a new path stand for a checkpoint that was made already."""
        entry = {**like, "seq": 0, "checkpoint": copy.name, "time": self._clock()}
        await self._documents.create(
            caller.project, checkpoint_key(path), {"public": False, "entries": [entry]}
        )

    async def _begin(
        self, caller: Caller, path: CheckpointPath, entry: Fields, *, overwrite: bool
    ) -> pb.Keep:
        """Write down that a name is saved to, before it is: what to keep.

        Raises:
            AlreadyExists: the name is taken, and not to be overwritten.
        """
        adapter = path.model.adapter(caller.project)
        name = checkpoint_name(adapter, _checkpoint_id(path, entry["seq"]))
        entry = {**entry, "checkpoint": name, "time": self._clock()}
        key = checkpoint_key(path)
        document, ours = await self._documents.create(
            caller.project, key, {"public": False, "entries": [entry]}
        )
        for _ in range(_ATTEMPTS):
            if ours or _has(document.fields, entry):
                break
            if not overwrite and await self._is_taken(caller, document, path):
                raise AlreadyExists(
                    f"there is a checkpoint {path} already; overwrite it, or choose another name",
                    resource=path,
                )
            looked_at = document.fields["entries"]

            def added(fields: Fields, looked_at: list[Fields] = looked_at) -> Fields | None:
                entries = fields["entries"]
                # Another save that has come since may have taken the name.
                if _has(fields, entry) or (not overwrite and entries != looked_at):
                    return None
                kept = sorted([*entries, entry], key=lambda each: each["seq"])[-_MAX_ENTRIES:]
                return {**fields, "entries": kept}

            document = await self._documents.change(caller.project, key, added)
            ours = overwrite
        else:
            raise Unavailable(f"{path} is saved to all the time", resource=path)
        keep = pb.Keep(adapter=adapter, checkpoint=name)
        if entry["ttl"] is not None:
            keep.checkpoint_ttl.CopyFrom(duration_to_pb(entry["ttl"]))
        return keep

    async def _is_taken(self, caller: Caller, document: Document, path: CheckpointPath) -> bool:
        """Whether the name stands for something, or will once what is under way is done."""
        now = self._clock()
        for entry in document.fields["entries"]:
            ticket = TrainTicket(path.model, entry["seq"])
            try:
                future = await self._mesh.futures.wait(caller.future(ticket.future_id), 0)
            except NotFound:
                if now - entry["time"] < _COMING_S:
                    return True
                continue
            if not future.done:
                return True
        # Only now: what was under way until a moment ago is there.
        return await self._newest(document, path) is not None

    async def _newest(self, document: Document, path: CheckpointPath) -> Saved | None:
        for entry in reversed(document.fields["entries"]):
            try:
                checkpoint = await self._mesh.checkpoints.get(entry["checkpoint"])
            except NotFound:
                continue
            return Saved(path, document, entry, checkpoint)
        return None

    async def _drop(self, name: str) -> None:
        try:
            await self._mesh.checkpoints.delete(name)
        except NotFound:
            return


def _has(fields: Fields, entry: Fields) -> bool:
    return any(old["seq"] == entry["seq"] for old in fields["entries"])


def newest_of(document: Document, existing: dict[str, Checkpoint]) -> Saved | None:
    """What a document stands for, of the checkpoints that there are, by name; None: nothing."""
    for entry in reversed(document.fields["entries"]):
        if checkpoint := existing.get(entry["checkpoint"]):
            return Saved(path_of(document), document, entry, checkpoint)
    return None


def adapter_of(entry: Fields) -> str:
    """Resource name of the adapter whose checkpoint an entry is."""
    project, adapter, _ = parse_checkpoint(entry["checkpoint"])
    return f"projects/{project}/adapters/{adapter}"


def _checkpoint_id(path: CheckpointPath, seq: int) -> str:
    prefixes: dict[Kind, str] = {"weights": "w", "sampler_weights": "s", "external_weights": "x"}
    digest = hashlib.sha256(f"{path} {seq}".encode()).hexdigest()
    return f"{prefixes[path.kind]}-{digest[:40]}"

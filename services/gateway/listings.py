"""Runs and their checkpoints, as the SDK lists them: what the coordinator really has."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rollmesh.errors import NotFound
from services.gateway.checkpoints import adapter_of, newest_of
from services.gateway.queues import run_key
from services.gateway.sessions import labels, session_key
from services.gateway.wire.ids import ModelId
from services.gateway.wire.paths import TYPES, CheckpointPath

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rollmesh.types import Checkpoint
    from services.gateway.callers import Caller
    from services.gateway.checkpoints import Checkpoints, Saved
    from services.gateway.config import GatewayConfig
    from services.gateway.documents import Document, Documents, Fields
    from services.gateway.ports import Mesh

_MOST = 10_000
_AT_ONCE = 8


class Listings:
    """Lists runs and checkpoints."""

    def __init__(
        self, config: GatewayConfig, mesh: Mesh, documents: Documents, checkpoints: Checkpoints
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._documents = documents
        self._checkpoints = checkpoints

    async def runs(self, caller: Caller, *, limit: int, offset: int, project: str | None) -> Fields:
        """Training runs, the newest first."""
        found: list[Document] = []
        total = 0
        if project in {None, "", caller.project_id, caller.project}:
            found, total = await self._documents.page(
                caller.project, "runs/", limit=limit, offset=offset
            )
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(document: Document) -> Fields:
            async with gate:
                return await self._run(caller, document)

        async with asyncio.TaskGroup() as tasks:
            told = [tasks.create_task(one(document)) for document in found[:limit]]
        return {
            "training_runs": [task.result() for task in told],
            "cursor": _cursor(limit, offset, total),
        }

    async def run(self, caller: Caller, text: str) -> Fields:
        """One training run. NotFound: there is none of that id."""
        model = ModelId.parse(text, field="training_run_id")
        return await self._run(caller, await self._document(caller, model))

    async def of_run(self, caller: Caller, text: str) -> Fields:
        """All checkpoints of a run, the newest first."""
        model = ModelId.parse(text, field="training_run_id")
        await self._document(caller, model)
        saved = await self.saved(caller, f"checkpoints/{model}/")
        return {"checkpoints": [_checkpoint(each) for each in saved]}

    async def checkpoints(self, caller: Caller, *, limit: int, offset: int) -> Fields:
        """The caller's checkpoints, the newest first."""
        saved = await self.saved(caller, "checkpoints/")
        return {
            "checkpoints": [_checkpoint(each) for each in saved[offset : offset + limit]],
            "cursor": _cursor(limit, offset, len(saved)),
        }

    async def saved(self, caller: Caller, prefix: str) -> list[Saved]:
        """The checkpoints behind the documents with this prefix, the newest first."""
        documents = await self._documents.all(caller.project, prefix, most=_MOST)
        existing = await self._existing(documents)
        found = [newest_of(document, existing) for document in documents]
        there = [saved for saved in found if saved is not None]
        return sorted(there, key=lambda saved: saved.checkpoint.create_time, reverse=True)

    async def weights_info(self, caller: Caller, path: CheckpointPath) -> Fields:
        """What a checkpoint's weights are."""
        checkpoint = await self._checkpoints.get(caller, path)
        shape = await self._checkpoints.shape(caller, path, checkpoint)
        return {
            "base_model": shape["base_model"],
            "is_lora": True,
            "lora_rank": shape["rank"],
            "train_attn": shape["train_attn"],
            "train_mlp": shape["train_mlp"],
            "train_unembed": shape["train_unembed"] and self._config.unembedding,
            "optimizer_config": {"type": "adamw"},
        }

    async def _document(self, caller: Caller, model: ModelId) -> Document:
        document = await self._documents.find(caller.project, run_key(model))
        if document is None:
            raise NotFound(f"there is no training run {model}", resource=model)
        return document

    async def _run(self, caller: Caller, document: Document) -> Fields:
        model = ModelId.parse(document.key.partition("/")[2])
        saved = await self.saved(caller, f"checkpoints/{model}/")
        session = await self._documents.find(caller.project, session_key(model.session))
        times = [document.create_time, *(each.checkpoint.create_time for each in saved)]
        if session:
            times.append(session.fields.get("seen", 0.0))
        run = document.fields
        return {
            "training_run_id": str(model),
            "base_model": run["base_model"],
            "model_owner": caller.project_id,
            "is_lora": True,
            "corrupted": False,
            "lora_rank": run["rank"],
            "last_request_time": iso(max(times)),
            "last_checkpoint": _first(saved, "weights"),
            "last_sampler_checkpoint": _first(saved, "sampler_weights"),
            "user_metadata": labels(run.get("user_metadata")),
        }

    async def _existing(self, documents: Iterable[Document]) -> dict[str, Checkpoint]:
        """Of the adapters that these documents name, all checkpoints, by name."""
        adapters = sorted(
            {adapter_of(entry) for document in documents for entry in document.fields["entries"]}
        )
        found: dict[str, Checkpoint] = {}
        gate = asyncio.Semaphore(_AT_ONCE)

        async def look(adapter: str) -> None:
            async with gate:
                async for checkpoint in self._mesh.checkpoints.list(adapter):
                    found[checkpoint.name] = checkpoint

        async with asyncio.TaskGroup() as tasks:
            for adapter in adapters:
                tasks.create_task(look(adapter))
        return found


def iso(seconds: float) -> str:
    """Unix seconds as RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _checkpoint(saved: Saved) -> Fields:
    expires = saved.checkpoint.expire_time
    return {
        "checkpoint_id": saved.path.checkpoint_id,
        "checkpoint_type": TYPES[saved.path.kind],
        "time": iso(saved.checkpoint.create_time),
        "tinker_path": str(saved.path),
        "size_bytes": saved.checkpoint.num_bytes,
        "public": saved.document.fields.get("public", False),
        "user_metadata": labels(saved.entry.get("user_metadata")),
        "expires_at": None if expires is None else iso(expires),
    }


def _first(saved: list[Saved], kind: str) -> Fields | None:
    return next((_checkpoint(each) for each in saved if each.path.kind == kind), None)


def _cursor(limit: int, offset: int, total: int) -> dict[str, Any]:
    return {"limit": limit, "offset": offset, "total_count": total}

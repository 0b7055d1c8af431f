"""Copies of checkpoints: into another run, or with another time to live."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import checkpoint_name
from services.gateway.queues import begin_run
from services.gateway.sessions import check_project, session_key
from services.gateway.wire.ids import ModelId, session_id
from services.gateway.wire.paths import CheckpointPath

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.types import Checkpoint
    from services.gateway.callers import Caller
    from services.gateway.checkpoints import Checkpoints
    from services.gateway.documents import Documents, Fields
    from services.gateway.ports import Mesh
    from services.gateway.sessions import Sessions
    from services.gateway.wire import bodies

_PASSING_S = 600.0
"""How long the adapter stays that a copy goes through, should nobody delete it."""


class Copies:
    """Copies checkpoints, by an adapter that is forked, kept and deleted.

    `clock`: Unix seconds; `new_id`: hexadecimal digits, never the same.
    """

    def __init__(
        self,
        mesh: Mesh,
        documents: Documents,
        sessions: Sessions,
        checkpoints: Checkpoints,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._mesh = mesh
        self._documents = documents
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._clock = clock
        self._new_id = new_id

    async def copy(self, caller: Caller, body: bodies.CopyWeights, request_id: str) -> Fields:
        """A run of its own with a copy; a repeat with the same `request_id` answers the same."""
        check_project(caller, body.destination_project_id)
        source = CheckpointPath.parse(body.source_path, field="source_path")
        saved = await self._checkpoints.find(caller, source)
        model = await self._model(caller, body, request_id)
        shape = await self._checkpoints.shape(caller, source, saved.checkpoint)
        run = {
            **shape,
            "user_metadata": None,
            "loaded_from": str(source),
            "copy": True,
            "time": self._clock(),
        }
        await begin_run(self._documents, caller.project, model, run)
        path = CheckpointPath(model, source.kind, source.name)
        try:
            await self._checkpoints.find(caller, path)
        except NotFound:
            copy = await self._through(
                saved.checkpoint, model.adapter(caller.project), body.ttl_seconds
            )
            like = {**saved.entry, "ttl": body.ttl_seconds}
            await self._checkpoints.adopt(caller, path, copy, like)
        return {"tinker_path": str(path)}

    async def set_ttl(self, caller: Caller, path: CheckpointPath, ttl_s: int | None) -> None:
        """Have a checkpoint deleted `ttl_s` seconds from now; None: never.

        The coordinator's checkpoints keep the time that they were made with: it becomes another.
        """
        saved = await self._checkpoints.find(caller, path)
        if ttl_s is None and saved.checkpoint.expire_time is None:
            return
        adapter = caller.adapter(f"c-{self._new_id()}")
        copy = await self._through(saved.checkpoint, adapter, ttl_s)
        await self._checkpoints.replace(caller, saved, copy)

    async def _model(self, caller: Caller, body: bodies.CopyWeights, request_id: str) -> ModelId:
        if (body.session_id is None) != (body.model_seq_id is None):
            raise InvalidRequest("session_id and model_seq_id go together", field="session_id")
        if body.session_id is not None and body.model_seq_id is not None:
            await self._sessions.get(caller, session_id(body.session_id))
            return ModelId(body.session_id, body.model_seq_id)
        # One of its own, the same for each repeat.
        digest = hashlib.sha256(f"{caller.project} {request_id or self._new_id()}".encode())
        session = f"s{digest.hexdigest()[:16]}"
        now = self._clock()
        fields = {"tags": ["copy_weights"], "key": caller.key, "time": now, "seen": now}
        finished = {"reason": "success", "detail": None}
        await self._documents.create(
            caller.project, session_key(session), {**fields, "finished": finished}
        )
        return ModelId(session, 0)

    async def _through(self, source: Checkpoint, adapter: str, ttl_s: int | None) -> Checkpoint:
        """A copy of `source` by way of `adapter`, which goes again."""
        digest = hashlib.sha256(f"{adapter} {source.name} {ttl_s}".encode()).hexdigest()[:32]
        await self._mesh.adapters.fork(
            adapter, source.name, f"fork-{digest}", with_optimizer=True, idle_ttl_s=_PASSING_S
        )
        copy = await self._mesh.checkpoints.create(
            checkpoint_name(adapter, f"k-{digest}"), f"keep-{digest}", ttl_s=ttl_s
        )
        await self._mesh.adapters.delete(adapter, f"drop-{digest}")
        return copy

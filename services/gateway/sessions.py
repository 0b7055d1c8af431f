"""Sessions: the life of one client of the SDK, and what it made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachetools import TTLCache

from rollmesh.errors import InvalidRequest, MeshError, NotFound
from services.gateway.wire.ids import ModelId, session_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.gateway.callers import Caller
    from services.gateway.config import GatewayConfig
    from services.gateway.documents import Document, Documents, Fields
    from services.gateway.policies import Policies
    from services.gateway.wire import bodies

SEEN_EVERY_S = 60.0
ALIVE_S = 300.0
"""A session that was not heard of for so long is no longer known to be running."""
SESSION_TTL_S = 90 * 86400.0
"""For so long after its last sign of life a session is listed; its runs and checkpoints stay."""
_KNOWN = 10_000
_LISTED = 10_000

UNEMBEDDING = (
    "train_unembed is accepted and not applied: the samplers of this mesh do not load adapters of "
    "the unembedding. Attention and MLP are trained."
)
SUBSTITUTE = (
    "stable_reinforce is this mesh's own loss in place of one whose formula is not public: see "
    "docs/tinker.md."
)


def session_key(session: str) -> str:
    """Key of its document."""
    return f"sessions/{session}"


class Sessions:
    """Begins, keeps and ends sessions. `clock`: Unix seconds; `new_id`: 16 hexadecimal digits."""

    def __init__(
        self,
        config: GatewayConfig,
        documents: Documents,
        policies: Policies,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._config = config
        self._documents = documents
        self._policies = policies
        self._clock = clock
        self._new_id = new_id
        # Of which this gateway wrote down a moment ago that they live.
        self._noted: TTLCache[str, bool] = TTLCache(_KNOWN, SEEN_EVERY_S, timer=clock)

    async def create(self, caller: Caller, body: bodies.CreateSession) -> Fields:
        """A new session."""
        check_project(caller, body.project_id)
        session = f"s{self._new_id()}"
        now = self._clock()
        await self._documents.create(
            caller.project,
            session_key(session),
            {
                "tags": body.tags,
                "user_metadata": body.user_metadata,
                "display_name": body.display_name,
                "sdk_version": body.sdk_version,
                "key": caller.key,
                "time": now,
                "seen": now,
            },
            ttl_s=SESSION_TTL_S,
        )
        answer: Fields = {"type": "create_session", "session_id": session}
        if not self._config.unembedding:
            answer["warning_message"] = UNEMBEDDING
        if self._config.stable_reinforce == "substitute":
            answer["info_message"] = SUBSTITUTE
        return answer

    async def get(self, caller: Caller, session: str) -> Document:
        """Its document. NotFound: this caller has no such session."""
        session_id(session)
        try:
            return await self._documents.seen(caller.project, session_key(session))
        except NotFound:
            raise NotFound(f"there is no session {session}", resource=session) from None

    async def heartbeat(self, caller: Caller, session: str) -> None:
        """It lives: so do the versions of its newest sampling sessions."""
        await self.get(caller, session)
        if session not in self._noted:
            now = self._clock()
            await self._documents.change(
                caller.project,
                session_key(session),
                lambda fields: {**fields, "seen": now},
                ttl_s=SESSION_TTL_S,
            )
            # Only now: what failed is done with the next sign of life.
            self._noted[session] = True
        if self._policies.is_due(session):
            try:
                await self._keep(caller, session)
            except MeshError:
                self._policies.forget(session)
                raise

    async def _keep(self, caller: Caller, session: str) -> None:
        """The newest of what a session made lasts as long again."""
        newest = self._config.leases_per_session
        samplers, _ = await self._documents.page(
            caller.project, f"samplers/{session}:", limit=newest
        )
        await self._policies.renew(samplers)
        runs, _ = await self._documents.page(caller.project, f"runs/{session}:", limit=newest)
        models = [ModelId.parse(run.key.partition("/")[2]) for run in runs]
        await self._policies.keep_models([model.adapter(caller.project) for model in models])

    async def finish(self, caller: Caller, session: str, body: bodies.Finish) -> None:
        """Its client is done with it. What it made stays."""
        await self.get(caller, session)
        finished = {"reason": body.reason.type, "detail": body.detail}
        await self._documents.change(
            caller.project,
            session_key(session),
            lambda fields: {**fields, "finished": finished},
            ttl_s=SESSION_TTL_S,
        )

    async def tell(self, caller: Caller, session: str) -> Fields:
        """What it made."""
        document = await self.get(caller, session)
        runs = await self._documents.all(caller.project, f"runs/{session}:", most=_LISTED)
        samplers = await self._documents.all(caller.project, f"samplers/{session}:", most=_LISTED)
        return {
            "training_run_ids": [run.key.partition("/")[2] for run in runs],
            "sampler_ids": [sampler.key.partition("/")[2] for sampler in samplers],
            "user_metadata": labels(document.fields.get("user_metadata")),
            "display_name": document.fields.get("display_name"),
        }

    async def list(self, caller: Caller, *, limit: int, offset: int) -> Fields:
        """The ids of the caller's, the newest first."""
        page, _ = await self._documents.page(
            caller.project, "sessions/", limit=limit, offset=offset
        )
        return {"sessions": [document.key.partition("/")[2] for document in page][:limit]}

    async def assign(self, caller: Caller, session: str, project: str) -> None:
        """A session stays in the project of its key."""
        await self.get(caller, session)
        check_project(caller, project)


def check_project(caller: Caller, project: str | None) -> None:
    """A key lets into one project."""
    if project not in {None, "", caller.project_id, caller.project}:
        raise InvalidRequest(
            f"project_id: {project!r}; this key is of the project {caller.project_id!r}",
            field="project_id",
            value=project,
            allowed=caller.project_id,
        )


def labels(metadata: Any) -> dict[str, str] | None:
    """Metadata as the SDK reads it back: strings."""
    if not isinstance(metadata, dict):
        return None
    return {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}

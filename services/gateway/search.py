"""The search for sessions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from services.gateway.sessions import ALIVE_S, labels

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.gateway.callers import Caller
    from services.gateway.documents import Document, Documents, Fields
    from services.gateway.wire import bodies

_MOST = 10_000
"""The newest sessions of a project that are looked at."""


class Search:
    """Finds sessions. `clock`: Unix seconds."""

    def __init__(self, documents: Documents, clock: Callable[[], float]) -> None:
        self._documents = documents
        self._clock = clock

    async def sessions(self, caller: Caller, body: bodies.SearchSessions) -> Fields:
        """One page, the newest first."""
        if body.project_ids is not None and not {caller.project_id, caller.project} & set(
            body.project_ids
        ):
            return {"sessions": [], "next_cursor": None}
        found = await self._documents.all(caller.project, "sessions/", most=_MOST)
        fitting = sorted(
            (document for document in found if self._fits(caller, document, body)),
            key=_place,
            reverse=True,
        )
        if body.cursor:
            after = (body.cursor.last_created_at, body.cursor.last_session_id)
            fitting = [document for document in fitting if _place(document) < after]
        page = fitting[: body.limit]
        more = len(fitting) > len(page)
        return {
            "sessions": [await self._summary(caller, document) for document in page],
            "next_cursor": {
                "last_created_at": _place(page[-1])[0].isoformat(),
                "last_session_id": _place(page[-1])[1],
            }
            if more
            else None,
        }

    def _fits(self, caller: Caller, document: Document, body: bodies.SearchSessions) -> bool:
        fields = document.fields
        metadata = labels(fields.get("user_metadata")) or {}
        if any(metadata.get(key) != value for key, value in body.user_metadata.items()):
            return False
        if body.owner.type == "user" and _owner(document, caller) not in body.owner.owner_urns:
            return False
        if body.statuses is not None and not any(
            self._has(document, query) for query in body.statuses
        ):
            return False
        if body.session_id is None and body.display_name is None:
            return True
        name = (fields.get("display_name") or "").lower()
        words = (body.display_name or "").lower().split()
        return _place(document)[1] == body.session_id or (
            bool(words) and all(word in name for word in words)
        )

    def _has(self, document: Document, query: bodies.StatusQuery) -> bool:
        status = self._status(document)
        if status is None or status["type"] != query.type:
            return False
        return query.reasons is None or status["reason"]["type"] in query.reasons

    def _status(self, document: Document) -> Fields | None:
        if finished := document.fields.get("finished"):
            return {
                "type": "client_finished",
                "reason": {"type": finished["reason"]},
                "detail": finished["detail"],
            }
        if self._clock() - document.fields.get("seen", 0.0) < ALIVE_S:
            return {"type": "active"}
        return None

    async def _summary(self, caller: Caller, document: Document) -> Fields:
        created, session = _place(document)
        _, checkpoints = await self._documents.page(
            caller.project, f"checkpoints/{session}:", limit=1
        )
        return {
            "session_id": session,
            "created_at": created.isoformat(),
            "owner": _owner(document, caller),
            "project_id": caller.project_id,
            "status": self._status(document),
            "checkpoints_count": checkpoints,
            "display_name": document.fields.get("display_name"),
            "user_metadata": labels(document.fields.get("user_metadata")),
        }


def _place(document: Document) -> tuple[datetime, str]:
    """In the order of the search."""
    return (
        datetime.fromtimestamp(document.create_time, UTC),
        document.key.partition("/")[2],
    )


def _owner(document: Document, caller: Caller) -> str:
    return f"rollmesh:{document.fields.get('key', caller.key)}"

"""What a key's holder may know of the project: its key, its events, what it uses."""

from __future__ import annotations

import hashlib
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest
from services.gateway.listings import iso

if TYPE_CHECKING:
    from services.gateway.callers import Caller
    from services.gateway.documents import Documents, Fields
    from services.gateway.listings import Listings

_EVENTS = ("all", "checkpoints", "projects", "teams", "organizations")
_MOST = 1000


class Account:
    """Tells a caller of its project."""

    def __init__(self, documents: Documents, listings: Listings) -> None:
        self._documents = documents
        self._listings = listings

    def key(self, caller: Caller) -> Fields:
        """The key that it shows."""
        digest = hashlib.sha256(caller.key.encode()).hexdigest()
        return {
            "key_id": int(digest[:7], 16),
            "name": caller.prefix or caller.key,
            "note": caller.note,
            "details": {
                "org_details": {"name": caller.project_id},
                "user_details": {"email": ""},
            },
        }

    async def audit(self, caller: Caller, event_type: str, day: str | None) -> Fields:
        """What was made, the oldest first: sessions, and checkpoints that there still are."""
        if event_type not in _EVENTS:
            allowed = ", ".join(_EVENTS)
            raise InvalidRequest(
                f"event_type: {event_type[:50]!r} is not one of {allowed}",
                field="event_type",
                value=event_type[:50],
                allowed=allowed,
            )
        begin, end = _day(day)
        entries: list[Fields] = []
        if event_type in {"all", "checkpoints"}:
            for saved in await self._listings.saved(caller, "checkpoints/"):
                if begin <= saved.checkpoint.create_time < end:
                    path = str(saved.path)
                    details = {"tinker_path": path, "model_id": str(saved.path.model)}
                    entries.append(
                        {
                            "timestamp": iso(saved.checkpoint.create_time),
                            "event": "checkpoint_create",
                            "event_details": details,
                            **details,
                        }
                    )
        if event_type in {"all", "projects"}:
            sessions, _ = await self._documents.page(caller.project, "sessions/", limit=_MOST)
            entries += [
                {
                    "timestamp": iso(document.create_time),
                    "event": "session_create",
                    "event_details": {
                        "session_id": document.key.partition("/")[2],
                        "key": document.fields.get("key"),
                    },
                }
                for document in sessions
                if begin <= document.create_time < end
            ]
        return {"entries": sorted(entries, key=lambda entry: entry["timestamp"])[:_MOST]}

    def usage(self) -> Fields:
        """Nobody is billed here, and nothing is kept for it."""
        return {"data": [], "sessions": {}, "cost_data_through": None}

    async def storage(self, caller: Caller) -> Fields:
        """What the project's checkpoints take."""
        saved = await self._listings.saved(caller, "checkpoints/")
        size = sum(each.checkpoint.num_bytes for each in saved)
        item = {
            "project_id": caller.project_id,
            "checkpoint_count": len(saved),
            "size_bytes": size,
            "size_gigabytes": size / 1e9,
        }
        return {"effective_rate_usd_per_gigabyte_month": None, "data": [item] if saved else []}


def _day(text: str | None) -> tuple[float, float]:
    """Of a day in UTC the first second, and that of the next; without one all time."""
    if text is None:
        return 0.0, float("inf")
    try:
        begin = datetime.combine(date.fromisoformat(text[:10]), time(), UTC)
    except ValueError:
        raise InvalidRequest(f"day: {text[:50]!r} is no date", field="day") from None
    return begin.timestamp(), (begin + timedelta(days=1)).timestamp()

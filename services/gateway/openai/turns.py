"""What was drawn, kept for a while, so that a trainer can fetch it after an agent is done."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from rollmesh.errors import MeshError, NotFound

if TYPE_CHECKING:
    from services.gateway.openai.ports import Records

MAX_RECORD_BYTES = 256 * 1024
_ID = re.compile(r"(?:chatcmpl|cmpl)-[0-9a-f]{32}")


class Turns:
    """Turns of all projects as records: `turns/{id}`, and where it is too large `turns/{id}/{n}`.

    Args:
        ttl_s: for how long a turn is kept; None: not at all.
        max_bytes: the largest that is, as JSON.
    """

    def __init__(self, records: Records, *, ttl_s: float | None, max_bytes: int) -> None:
        self._records = records
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes

    async def keep(self, project: str, turn: dict[str, Any]) -> str:
        """Keep `turn` under its id. Why it could not be; empty: it is.

        What was drawn is worth more than the record of it: the caller gets it in any case.
        """
        if self._ttl_s is None:
            return ""
        value = json.dumps(turn, allow_nan=False, separators=(",", ":")).encode()
        key = f"turns/{turn['id']}"
        if len(value) > self._max_bytes:
            return f"the turn is not kept: {len(value)} bytes are more than {self._max_bytes}"
        parts = [value[at : at + MAX_RECORD_BYTES] for at in range(0, len(value), MAX_RECORD_BYTES)]
        if len(parts) > 1:
            parts = [json.dumps({"num_parts": len(parts)}).encode(), *parts]
        try:
            # The first comes last: where it is, all of them are.
            for number, part in reversed(list(enumerate(parts))):
                name = f"{key}/{number}" if number else key
                await self._records.put(project, name, part, ttl_s=self._ttl_s)
        except MeshError as error:
            return f"the turn is not kept: {error}"
        return ""

    async def get(self, project: str, turn_id: str) -> dict[str, Any]:
        """A turn. NotFound: there is none of that id, it has expired, or none are kept."""
        if self._ttl_s is None:
            raise NotFound("this gateway keeps no turns (openai.keep_turns)", field="id")
        if not _ID.fullmatch(turn_id):
            raise _unknown(turn_id)
        try:
            first = await self._records.get(project, f"turns/{turn_id}")
            turn: dict[str, Any] = json.loads(first.value)
            if "num_parts" in turn:
                parts = [
                    (await self._records.get(project, f"turns/{turn_id}/{number}")).value
                    for number in range(1, turn["num_parts"] + 1)
                ]
                turn = json.loads(b"".join(parts))
        except NotFound:
            raise _unknown(turn_id) from None
        return turn


def _unknown(turn_id: str) -> NotFound:
    return NotFound(
        f"id: there is no turn {turn_id[:100]!r}, or it has expired", field="id", value=turn_id
    )

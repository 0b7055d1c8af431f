"""The `request_id` that stands for a future: the future's id, and what its answer needs besides.

The gateway remembers nothing between the request and the answer. So what the coordinator does not
know, such as the name that a client gave a checkpoint, travels in the id that the client brings
back. A forged one changes nothing but the forger's own answer.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from typing import Any

from rollmesh.errors import NotFound
from services.gateway.wire.ids import MAX_SEQ, ModelId, SamplerId, base36

_TRAIN = re.compile(
    r"t-(s[0-9a-f]{16})-(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,9})(?:\.([\w-]{1,4096}))?"
)
_SAMPLE = re.compile(
    r"a-(s[0-9a-f]{16})-([0-9a-z]{1,6})-([0-9a-z]{1,6})-([0-9a-z]{1,13})-([0-9a-z]{1,6})"
)


@dataclass(frozen=True, slots=True)
class TrainTicket:
    """A future of a model: position `seq` of its queue. `note`: what its answer needs."""

    model: ModelId
    seq: int
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def future_id(self) -> str:
        """Id of the future."""
        return f"t-{self.model.queue}-{self.seq}"

    def __str__(self) -> str:
        if not self.note:
            return self.future_id
        text = json.dumps(self.note, separators=(",", ":"), sort_keys=True).encode()
        return f"{self.future_id}.{base64.urlsafe_b64encode(text).decode().rstrip('=')}"


@dataclass(frozen=True, slots=True)
class SampleTicket:
    """A future of sampling. `last_n`: of how many prompt tokens it tells; 0: of all."""

    sampler: SamplerId
    seq: int
    last_n: int = 0

    @property
    def future_id(self) -> str:
        """Id of the future."""
        numbers = (self.sampler.number, self.sampler.save_seq, self.seq, self.last_n)
        return "-".join(["a", self.sampler.session, *map(base36, numbers)])

    def __str__(self) -> str:
        return self.future_id


def parse(request_id: str) -> TrainTicket | SampleTicket:
    """What `request_id` stands for.

    Raises:
        NotFound: for nothing that a gateway ever gave out.
    """
    if match := _SAMPLE.fullmatch(request_id):
        number, save_seq, seq, last_n = (int(match[index], 36) for index in range(2, 6))
        ticket = SampleTicket(SamplerId(match[1], number, save_seq), seq, last_n)
        if str(ticket) == request_id and seq < 2**63:
            return ticket
    if match := _TRAIN.fullmatch(request_id):
        note = _note(match[4]) if match[4] else {}
        seq = int(match[3])
        if note is not None and seq <= MAX_SEQ:
            return TrainTicket(ModelId(match[1], int(match[2])), seq, note)
    raise NotFound(f"there is no request {request_id[:100]!r}", resource=request_id[:100])


def _note(text: str) -> dict[str, Any] | None:
    try:
        note = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) else None

"""What the gateway remembers of documents."""

from __future__ import annotations

import collections

from rollmesh.types import Record
from services.gateway.documents import Documents


class Records:
    """Has every record, and counts how often each is read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.reads: collections.Counter[str] = collections.Counter()

    async def get(self, project, key):
        self.reads[key] += 1
        return Record(key, b'{"x":"' + b"x" * self.length + b'"}', 1, 1.0, None)


async def test_a_small_document_is_read_once_until_it_is_old():
    now = [0.0]
    records = Records(10)
    documents = Documents(records, lambda: now[0])
    for _ in range(3):
        assert (await documents.seen("projects/p", "k")).fields == {"x": "x" * 10}
    assert records.reads["k"] == 1
    now[0] = 31.0
    await documents.seen("projects/p", "k")
    assert records.reads["k"] == 2


async def test_a_large_document_is_not_kept_in_memory():
    records = Records(100_000)
    documents = Documents(records, lambda: 0.0)
    for _ in range(3):
        await documents.seen("projects/p", "k")
    assert records.reads["k"] == 3

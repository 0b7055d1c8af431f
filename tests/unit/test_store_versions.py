"""What letting go of many versions costs: counted, not timed."""

from __future__ import annotations

import pytest
from sqlalchemy import event, insert

from rollmesh import types
from services.coordinator.store import Request, open_store
from services.coordinator.store.tables import versions
from services.coordinator.store.versions import MAX_DELETED, MAX_LET_GO

A = "projects/p/adapters/a"
LORA = types.LoraConfig(rank=4)
COUNT = 10_000
STEPS_EACH = 2_000
"""Of SQLite's machine for each version: it walks over all of them once in MAX_LET_GO."""


class Meter:
    """Counts statements, and thousands of steps of SQLite's machine, on every connection."""

    def __init__(self, engine) -> None:
        self.statements = 0
        self.thousand_steps = 0
        self.most_parameters = 0
        event.listen(engine, "before_cursor_execute", self._execute)
        event.listen(engine, "checkout", self._checkout)

    def _execute(self, _connection, _cursor, _statement, parameters, *_):
        self.statements += 1
        self.most_parameters = max(self.most_parameters, len(parameters))

    def _checkout(self, connection, *_):
        connection.driver_connection._conn.set_progress_handler(self._step, 1000)

    def _step(self):
        self.thousand_steps += 1


@pytest.fixture
async def store(tmp_path):
    async with open_store(f"sqlite:///{tmp_path}/c.sqlite", request_retention_s=1e9) as opened:
        yield opened


async def test_ten_thousand_due_versions_of_an_adapter_go_in_small_transactions(store):
    request = Request.of("p", "c", "CreateAdapter", A)
    await store.adapters.reserve(A, "arith", LORA, job="", request=request, now=0.0)
    rows = [
        {
            "adapter": A,
            "policy_version": number,
            "digest": "d",
            "create_time": 0.0,
            "export_key": "",
            "supersede_time": 1.0 if number < COUNT else None,
        }
        for number in range(COUNT + 1)
    ]

    async def fill(connection):
        await connection.execute(insert(versions), rows)

    database = store.versions._database
    await database.transact(fill)
    meter = Meter(database._engine.sync_engine)
    gone = []
    while some := await store.versions.let_go(superseded_before=2.0, max_superseded=64, now=2.0):
        assert len(some) <= MAX_LET_GO
        gone += [each.policy_version for each in some]
    assert gone == list(range(COUNT))
    # BEGIN, the lock and the deletion for each of the transactions, and a few for each look.
    assert meter.statements <= 3.5 * COUNT / MAX_DELETED
    assert meter.most_parameters <= MAX_DELETED + 2
    assert 0 < meter.thousand_steps * 1000 <= STEPS_EACH * COUNT
    assert list(await store.versions.since(A, 0)) == [COUNT]

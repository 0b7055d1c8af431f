"""Rewards for SQL queries, by what they find in an SQLite database made for the purpose.

A query is a model's: it reads and does nothing else, and its time, memory and rows are bounded.
"""

from __future__ import annotations

import collections
import json
import sqlite3
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, PositiveInt

from rollmesh.chat import Scored
from rollmesh.config import Config
from rollmesh.errors import InvalidRequest
from services.reward.functions.fences import fenced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rollmesh.types import ScoreItem

Rows: TypeAlias = list[tuple[Any, ...]]

_MAX_STEPS = 50_000_000
"""Of SQLite's virtual machine, for one query: under a second, and on any machine the same."""
_STEPS_BETWEEN = 1_000_000
_MAX_HEAP_BYTES = 256 << 20
"""Of SQLite in this process, from the first query on: the process is one for functions alone."""
_MAX_VALUE_BYTES = 1 << 20
_READS = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)
_FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer", "writefile", "readfile"})


class SqlMatch(Config):
    """Parameters of sql_match."""

    database: Annotated[str, Field(max_length=1 << 20)] = ""
    """SQL that makes the tables and fills them, in SQLite's dialect. Empty: the reference says it.
    """
    ordered: bool = False
    """Whether the order of the rows counts. Where not, how often each of them comes does."""
    max_rows: Annotated[PositiveInt, Field(le=100_000)] = 10_000
    """Most rows that a query may find."""
    find: Literal["whole", "fence"] = "fence"
    """Where in the completion the query is: the whole of it; or its last fenced block, and the
    whole where there is none."""


def sql_match(item: ScoreItem, parameters: SqlMatch) -> Scored:
    """1 where the completion's SQL query finds the rows that the reference's finds; else 0.

    Both run on a fresh SQLite database in memory. Names of columns do not count, their order does;
    numbers are compared to 10 significant digits. The reference is a query, or a JSON object with
    `query` and `database`. A query that writes, or takes too much time, memory or rows, gets 0.
    """
    database, query = _reference(item.reference, parameters)
    try:
        expected = _rows(database, query, parameters.max_rows)
    except _BadDatabase as bad:
        field = "parameters.database" if parameters.database else "reference"
        raise InvalidRequest(str(bad), field=field, value=database[:100]) from None
    except _Bad as bad:
        raise InvalidRequest(
            f"the query of the reference cannot be run: {bad}",
            field="reference",
            value=query[:100],
        ) from None
    text = fenced(item.completion) if parameters.find == "fence" else None
    try:
        found = _rows(database, item.completion if text is None else text, parameters.max_rows)
    except _Bad as bad:
        return Scored(0.0, feedback=str(bad)[:300])
    if parameters.ordered:
        equal = found == expected
    else:
        equal = collections.Counter(found) == collections.Counter(expected)
    return Scored(
        float(equal), feedback="" if equal else f"{len(found)} rows, not the {len(expected)} wanted"
    )


class _Bad(Exception):
    """A query cannot be run; the message says why."""


class _BadDatabase(Exception):
    """A database cannot be made; the message says why."""


def _reference(reference: str, parameters: SqlMatch) -> tuple[str, str]:
    """The database, and the query."""
    if parameters.database:
        return parameters.database, reference
    try:
        match json.loads(reference):
            case {"database": str(database), "query": str(query)}:
                return database, query
    except ValueError:
        pass
    raise InvalidRequest(
        "not a JSON object with `database` and `query`, as sql_match needs it where it has no "
        "`database`",
        field="reference",
        value=reference[:100],
    )


def _rows(database: str, query: str, max_rows: int) -> Rows:
    """What `query` finds in a new `database`.

    Raises:
        _BadDatabase: the database cannot be made.
        _Bad: the query cannot be run.
    """
    connection = sqlite3.connect(":memory:")
    try:
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        connection.execute(f"PRAGMA hard_heap_limit = {_MAX_HEAP_BYTES}")
        _bound(connection)
        try:
            connection.executescript(database)
        except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError) as error:
            raise _BadDatabase(f"the database cannot be made: {error}") from None
        connection.set_authorizer(_authorize)
        _bound(connection)
        try:
            rows = connection.execute(query).fetchmany(max_rows + 1)
        except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError) as error:
            raise _Bad(f"{type(error).__name__}: {error}") from None
        if len(rows) > max_rows:
            raise _Bad(f"more than {max_rows} rows")
        return [tuple(_values(row)) for row in rows]
    finally:
        connection.close()


def _bound(connection: sqlite3.Connection) -> None:
    """Interrupt what takes more than _MAX_STEPS from here on."""
    left = _MAX_STEPS // _STEPS_BETWEEN

    def is_over() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    connection.set_progress_handler(is_over, _STEPS_BETWEEN)


def _authorize(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


def _values(row: tuple[Any, ...]) -> Iterator[Any]:
    for value in row:
        yield float(f"{value:.10g}") if isinstance(value, float) else value

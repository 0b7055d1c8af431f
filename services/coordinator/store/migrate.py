"""Bring a database to this build's schema, with the migrations that lie beside this file.

A new one is a module in migrations/versions whose `down_revision` is the newest one's; a test
compares the outcome with tables.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from rollmesh.errors import FailedPrecondition

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

_FOLDER = Path(__file__).parent / "migrations"


async def migrate(connection: AsyncConnection, revision: str = "head") -> None:
    """Apply the migrations that the database lacks, up to `revision`.

    Raises:
        FailedPrecondition: it was made by a newer build.
    """
    await connection.run_sync(_upgrade, revision)


def _upgrade(connection: Connection, revision: str) -> None:
    # Its own account of every start would drown ours.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision)
    except CommandError as error:
        head = ScriptDirectory.from_config(config).get_current_head()
        raise FailedPrecondition(
            f"the database's schema is not one that this build knows (it goes up to {head}): "
            f"{error}",
            field="database",
        ) from error

"""Real databases for tests, each empty."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from services.coordinator.store import check_url

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def postgresql_server() -> Iterator[str]:
    """The URL of a PostgreSQL server on a free port, without the database's name.

    Skips the test where no server is installed.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        user: list[str] = []
        if os.getuid() == 0:  # as which it refuses to run
            shutil.chown(folder, "postgres")
            user = ["runuser", "-u", "postgres", "--"]
        data = f"{folder}/data"
        control = [*user, f"{found[-1]}/pg_ctl", "-D", data, "-w", "-s"]
        options = f"-p {port} -h 127.0.0.1 -c unix_socket_directories= -c fsync=off"
        _run(*user, f"{found[-1]}/initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N")
        free.close()
        _run(*control, "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}"
        finally:
            _run(*control, "-m", "immediate", "stop")


async def emptied(server: str, name: str) -> str:
    """The URL of a new database of that name on `server`."""
    engine = create_async_engine(check_url(f"{server}/postgres"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        await connection.execute(text(f"CREATE DATABASE {name}"))
    await engine.dispose()
    return f"{server}/{name}"


def _run(*command: str) -> None:
    # Not through pipes: the server would inherit and keep them.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(command, stdout=output, stderr=output, cwd="/", check=False)  # noqa: S603
        if done.returncode:
            output.seek(0)
            pytest.fail(f"{' '.join(command)}: {output.read().decode()}")

"""A mesh on this machine: `python -m services.local --config FILE [--state DIR]`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest, MeshError
from services.local.config import LocalConfig

if TYPE_CHECKING:
    from services.local.mesh import Mesh


def main() -> None:
    """Run the mesh until told to end; a second Ctrl-C kills what has not ended yet."""
    parser = argparse.ArgumentParser("python -m services.local", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see LocalConfig")
    parser.add_argument(
        "--state", type=Path, default=Path(".rollmesh"), help="where logs and jobs are kept"
    )
    arguments = parser.parse_args()
    try:
        with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
            asyncio.run(serve(LocalConfig.load(arguments.config), arguments.state))
    except InvalidRequest as error:
        parser.exit(2, f"error: {error}\n")
    except MeshError as error:
        parser.exit(1, f"error: {error}\n")


async def serve(config: LocalConfig, state_dir: Path) -> None:
    """Start the mesh, say where it is, and wait to be cancelled."""
    # Heavy imports come after the configuration is known to be right.
    from services.local.mesh import mesh  # noqa: PLC0415

    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - we run in one
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    _say("starting; the first start of a model takes some time")
    async with mesh(config, state_dir, _say) as running:
        _say(_description(running))
        try:
            await asyncio.Event().wait()
        finally:
            _say("stopping")


def _description(running: Mesh) -> str:
    lines = [
        f"  {name:<12} {member.address:<16} {member.log}"
        for name, member in running.members.items()
    ]
    lines = ["the mesh is serving:", *lines, f"export ROLLMESH_ADDRESS={running.address}"]
    if running.gateway_url:
        lines.append(f"export TINKER_BASE_URL={running.gateway_url}")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a person started this


if __name__ == "__main__":
    main()

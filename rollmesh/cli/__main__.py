"""`rollmesh`: errors become one line on standard error and an exit status.

0: done, and a job that was watched has SUCCEEDED. 1: it failed or was cancelled, or the mesh could
not do what was asked. 2: the command line or what it names is invalid.
"""

from __future__ import annotations

import sys

import typer

from rollmesh.cli import adapters, checkpoints, environments, fleet, jobs, projects, sweeps
from rollmesh.errors import MeshError

app = typer.Typer(
    name="rollmesh",
    help="Train language models by reinforcement learning on a Rollmesh.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(jobs.app, name="job")
app.add_typer(sweeps.app, name="sweep")
app.add_typer(adapters.app, name="adapter")
app.add_typer(checkpoints.app, name="checkpoint")
app.add_typer(environments.app, name="environment")
app.add_typer(fleet.app, name="fleet")
app.add_typer(projects.app, name="project")


def main() -> None:
    """Run the command line; always ends the process."""
    try:
        app()
    except MeshError as error:
        field = error.context.get("field", "")
        where = f" (field: {field})" if field and field not in str(error) else ""
        typer.echo(f"error: {error}{where}", err=True)
        sys.exit(2 if error.status == "INVALID_ARGUMENT" else 1)
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

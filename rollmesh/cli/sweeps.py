"""`rollmesh sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rollmesh import names
from rollmesh.cli.options import ADDRESS, PROJECT, Address, Json, Project, ask, collect, parent_name
from rollmesh.cli.output import local_time, print_json, print_table
from rollmesh.sweep import Sweep, load_sweep_file

if TYPE_CHECKING:
    from rollmesh.sweep import SweepSpec

app = typer.Typer(no_args_is_help=True, help="Sweeps: one spec, many jobs that are compared.")

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

SweepName = Annotated[str, typer.Argument(metavar="SWEEP", help="Id, or projects/P/sweeps/S.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show it until all of its jobs have ended.")]


@app.command()
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The sweep, as YAML.")],
    sweep_id: Annotated[
        str, typer.Option("--id", metavar="ID", help="Id of the sweep; else one is made up.")
    ] = "",
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Create the sweep in a file, and with it all of its jobs."""
    spec = load_sweep_file(file)
    parent = parent_name(project)
    sweep = ask(address, lambda client: client.sweeps.create(parent, spec, sweep_id))
    if watch:
        _watch(sweep.name, address, as_json=as_json)
    else:
        _show(sweep, as_json=as_json)


@app.command()
def get(
    sweep: SweepName,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Show one sweep: its jobs in one table, the best first.

    With --watch the exit status is 0 once the sweep has ENDED with a job that has SUCCEEDED, else
    1.
    """
    name = _sweep_name(sweep, project)
    if watch:
        _watch(name, address, as_json=as_json)
    else:
        _show(ask(address, lambda client: client.sweeps.get(name)), as_json=as_json)


@app.command("list")
def list_(address: Address = ADDRESS, project: Project = PROJECT, *, as_json: Json = False) -> None:
    """List the sweeps of a project, newest first."""
    parent = parent_name(project)
    sweeps = ask(address, lambda client: collect(client.sweeps.list(parent)))
    if as_json:
        print_json({"sweeps": sweeps})
        return
    print_table(
        ("NAME", "STATE", "JOBS", "VARIED", "BASE MODEL", "CREATED"),
        (
            (
                sweep.name,
                sweep.state,
                str(sweep.spec.num_jobs),
                ", ".join(_paths(sweep.spec)),
                sweep.spec.base.base_model,
                local_time(sweep.create_time),
            )
            for sweep in sweeps
        ),
    )


@app.command()
def cancel(
    sweep: SweepName,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """Cancel all jobs of a sweep that have not ended; their adapters are kept."""
    name = _sweep_name(sweep, project)
    _show(ask(address, lambda client: client.sweeps.cancel(name)), as_json=as_json)


def _sweep_name(name: str, project: str) -> str:
    """The resource name of a sweep that is named by its id in `project`, or in full."""
    if "/" in name:
        return names.sweep_name(*names.parse_sweep(name, field="sweep"))
    parent_name(project)
    return names.sweep_name(project, names.check_id(name, field="sweep"))


def _paths(spec: "SweepSpec") -> list[str]:
    paths = [parameter.path for parameter in spec.grid]
    return paths or list(dict.fromkeys(path for point in spec.points for path in point))


def _show(sweep: Sweep, *, as_json: bool) -> None:
    # Rich takes a while to import, and --help needs none of it.
    from rollmesh.cli.sweep_view import print_sweep  # noqa: PLC0415

    if as_json:
        print_json(sweep)
    else:
        print_sweep(sweep)


def _watch(name: str, address: str, *, as_json: bool) -> None:
    from rollmesh.cli.sweep_view import watch  # noqa: PLC0415

    try:
        sweep = ask(address, lambda client: watch(client.sweeps, name, as_json=as_json))
    except KeyboardInterrupt:
        typer.echo(f"the sweep goes on; `rollmesh sweep get {name} --watch` shows it", err=True)
        raise typer.Exit(INTERRUPTED) from None
    done = sweep.state == "ENDED" and any(job.state == "SUCCEEDED" for job in sweep.jobs)
    raise typer.Exit(0 if done else 1)

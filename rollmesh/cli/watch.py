"""Showing a job until it ends: a live view on a terminal, else a line an event, or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.live import Live

from rollmesh.cli.follow import ConnectionLost, final_state, follow
from rollmesh.cli.lines import event_line
from rollmesh.cli.output import print_json
from rollmesh.cli.view import JobView, lost_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.client import JobClient
    from rollmesh.job import JobEvent, JobState


async def watch(jobs: JobClient, name: str, *, as_json: bool = False) -> JobState:
    """Show the job `name` from its first event on; the state that it ended in."""
    # Asked first, so that a wrong name or address fails at once and is not taken for a lost
    # connection.
    job = await jobs.get(name)
    if as_json:
        return await _show(jobs, name, _to_stdout(print_json))
    console = Console()
    if not console.is_interactive:
        max_steps = job.spec.stop.max_steps
        return await _show(
            jobs, name, _to_stdout(lambda event: typer.echo(event_line(event, max_steps)))
        )
    view = JobView.of(job)

    def advance(item: JobEvent | ConnectionLost) -> None:
        nonlocal view
        view = view.after(item)

    # Live draws in a thread of its own; a view never changes, so it only ever sees whole ones.
    with Live(get_renderable=lambda: view, console=console):
        return await _show(jobs, name, advance)


async def _show(
    jobs: JobClient, name: str, show: Callable[[JobEvent | ConnectionLost], None]
) -> JobState:
    state: JobState | None = None
    async for item in follow(jobs, name):
        show(item)
        if not isinstance(item, ConnectionLost):
            state = final_state(item)
    assert state is not None  # noqa: S101 - what `follow` promises of its last item
    return state


def _to_stdout(
    print_event: Callable[[JobEvent], None],
) -> Callable[[JobEvent | ConnectionLost], None]:
    """Events to standard output, which may be piped on; what is wrong to standard error."""

    def show(item: JobEvent | ConnectionLost) -> None:
        if isinstance(item, ConnectionLost):
            typer.echo(lost_text(item), err=True)
        else:
            print_event(item)

    return show

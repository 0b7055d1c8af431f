"""A sweep as one table, once or until it ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rollmesh.cli.follow import FIRST_DELAY_S, LONGEST_DELAY_S, MOST_RETRIES, ConnectionLost
from rollmesh.cli.output import one_line, print_json
from rollmesh.cli.view import STATE_STYLES, lost_text
from rollmesh.errors import Unavailable
from rollmesh.names import parse_job
from rollmesh.sweep import describe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from rich.console import RenderableType

    from rollmesh.client import SweepClient
    from rollmesh.sweep import Sweep, SweepJob

REFRESH_S = 1.0


def print_sweep(sweep: Sweep) -> None:
    """The sweep and its jobs as they are."""
    Console().print(picture(sweep))


async def watch(sweeps: SweepClient, name: str, *, as_json: bool) -> Sweep:
    """Show the sweep `name` until it has ended; how it ended.

    On a terminal one table that changes; else a line for each job that changed, and the table at
    the end. JSON: the sweep, one line whenever it changed.
    """
    # Asked first, so that a wrong name or address fails at once.
    sweep = await sweeps.get(name)
    console = Console()
    if as_json or not console.is_interactive:
        return await _lines(sweeps, sweep, as_json=as_json)
    shown: list[RenderableType] = [picture(sweep)]
    with Live(get_renderable=lambda: Group(*shown), console=console) as live:
        async for item in follow(sweeps, sweep):
            if isinstance(item, ConnectionLost):
                shown[1:] = [Text(lost_text(item), style="bold yellow")]
            else:
                sweep, shown[:] = item, [picture(item)]
            live.refresh()
    return sweep


async def follow(
    sweeps: SweepClient, sweep: Sweep, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> AsyncIterator[Sweep | ConnectionLost]:
    """`sweep` and what becomes of it, whenever it has changed, until it has ended.

    Raises:
        Unavailable: the coordinator stayed away for MOST_RETRIES attempts in a row.
    """
    yield sweep
    retries = 0
    while sweep.state == "RUNNING":
        await sleep(REFRESH_S)
        try:
            newest = await sweeps.get(sweep.name)
        except Unavailable as error:
            if retries == MOST_RETRIES:
                raise
            delay = min(FIRST_DELAY_S * 2**retries, LONGEST_DELAY_S)
            retries += 1
            yield ConnectionLost(str(error), delay)
            await sleep(delay)
            continue
        retries = 0
        if newest != sweep:
            sweep = newest
            yield sweep


async def _lines(sweeps: SweepClient, sweep: Sweep, *, as_json: bool) -> Sweep:
    before: dict[str, SweepJob] = {}
    async for item in follow(sweeps, sweep):
        if isinstance(item, ConnectionLost):
            typer.echo(lost_text(item), err=True)
            continue
        sweep = item
        if as_json:
            print_json(sweep)
            continue
        for job in sweep.jobs:
            if before.get(job.job) != job:
                typer.echo("  ".join(part for part in _cells(sweep, job) if part))
        before = {job.job: job for job in sweep.jobs}
    if not as_json:
        print_sweep(sweep)
    return sweep


def picture(sweep: Sweep) -> RenderableType:
    """One line about the sweep, and one for each of its jobs, the best first."""
    title = Text.assemble((sweep.name, "bold"), "  ", (sweep.state, "bold blue"))
    halving = sweep.spec.halving
    if halving is not None:
        title.append(
            f"  by {halving.metric}, the best 1/{halving.factor} go on at step "
            f"{halving.first_step}, {halving.first_step * halving.factor}, …"
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("JOB", "VALUES", "STATE", "STEP", "METRIC", "RUNG", "REASON"):
        table.add_column(column, overflow="fold")
    for job in sweep.jobs:
        cells = [Text(cell) for cell in _cells(sweep, job)]
        cells[2].stylize(STATE_STYLES.get(job.state, ""))
        table.add_row(*cells)
    return Group(title, table)


def _cells(sweep: Sweep, job: SweepJob) -> tuple[str, ...]:
    max_steps = job.values.get("stop.max_steps", sweep.spec.base.stop.max_steps)
    values = ", ".join(f"{path}={text}" for path, text in describe(job.values).items())
    return (
        parse_job(job.job)[1],
        one_line(values),
        job.state,
        f"{job.step}/{max_steps}",
        "" if job.metric is None else f"{job.metric:.4g}",
        str(job.rung) if sweep.spec.halving else "",
        one_line(job.state_reason),
    )

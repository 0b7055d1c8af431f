"""`python -m services.coordinator.simulate`: how a fleet would do with a mix of jobs.

The scheduler and the buffer are the coordinator's own; samplers, trainers and rewards are modelled.
docs/simulator.md says what for.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer looks at it)
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from services.coordinator.simulation import timeline
from services.coordinator.simulation.calibration import Calibration
from services.coordinator.simulation.mixes import MIXES
from services.coordinator.simulation.policies import POLICIES
from services.coordinator.simulation.running import Result, simulate

app = typer.Typer(add_completion=False)


@app.command()
def main(
    calibration: Annotated[Path, typer.Option(help="Service times: a file of benchmarks/.")],
    mix: Annotated[str, typer.Option(help=f"One of {', '.join(MIXES)}.")] = "mixed",
    jobs: Annotated[int, typer.Option(min=1, max=10_000)] = 8,
    samplers: Annotated[int, typer.Option(min=1, max=1024)] = 4,
    trainers: Annotated[int, typer.Option(min=0, help="0: as the mix has work for them.")] = 0,
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(POLICIES)}.")] = "rollmesh",
    seed: Annotated[int, typer.Option(help="Of lengths and of rewards' times.")] = 0,
    picture: Annotated[
        Path | None, typer.Option("--timeline", help="A PNG of what each job did when.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every policy, compared.")] = False,  # noqa: FBT002
) -> None:
    """Simulate a mix of jobs on a fleet and print what came of it."""
    if mix not in MIXES:
        raise typer.BadParameter(f"{mix!r} is none of {', '.join(MIXES)}", param_hint="--mix")
    if policy not in POLICIES:
        raise typer.BadParameter(
            f"{policy!r} is none of {', '.join(POLICIES)}", param_hint="--policy"
        )
    results = {
        name: simulate(
            mix,
            name,
            num_jobs=jobs,
            num_samplers=samplers,
            num_trainers=trainers or None,
            calibration=Calibration.load(calibration),
            seed=seed,
        )
        for name in (POLICIES if every else (policy,))
    }
    num_trainers = next(iter(results.values())).num_trainers
    title = f"{jobs} jobs ({mix}), {samplers} samplers, {num_trainers} trainers"
    Console(width=140).print(table(title, results))
    if picture:
        timeline.draw({name: result.trace for name, result in results.items()}, picture)


def table(title: str, results: dict[str, Result]) -> Table:
    """A row for each policy."""
    made = Table(title=title, title_justify="left")
    for column in (
        "policy",
        "makespan s",
        "jobs per GPU-hour",
        "samplers busy",
        "while loaded",
        "slots",
        "trainers busy",
        "fleet while loaded",
        "step p50 s",
        "p95 s",
        "staleness",
        "Jain",
        "simulated in s",
    ):
        made.add_column(column, justify="left" if column == "policy" else "right")
    for name, result in results.items():
        of = result.figures
        made.add_row(
            name,
            f"{of.makespan_s:.0f}",
            f"{of.experiments_per_gpu_hour:.2f}",
            f"{of.sampler_busy:.1%}",
            f"{of.sampler_busy_loaded:.1%}",
            f"{of.sampler_slots_loaded:.1%}",
            f"{of.trainer_busy_loaded:.1%}",
            f"{of.fleet_busy_loaded:.1%}",
            f"{of.step_s_p50:.1f}",
            f"{of.step_s_p95:.1f}",
            f"{of.staleness_mean:.2f} / {of.staleness_max}",
            f"{of.jain:.3f}",
            f"{result.wall_s:.1f}",
        )
    return made


if __name__ == "__main__":
    app()

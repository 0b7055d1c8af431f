"""What jobs gain by sharing a mesh: `python -m benchmarks.multiplex [--steps N] [--picture PNG]`.

K = 1, 2, 4 and 8 live jobs of as many projects, strictly on-policy, share one sampler and one
trainer on two cores. Each step of a job draws 8 groups of 4, waits a second for its rewards,
trains and publishes: alone it leaves sampler and trainer idle for most of its time, which is what
others are to fill. Prints a table and, as its last line, one JSON object:

- scaling_kK: optimizer steps a second of K jobs together over those of one job. Counted from when
  each of the K has finished two steps until the first of them ends.
- busy_share_k8: processor time of sampler and trainer over the time of both, in that window with
  8 jobs. They are the accelerators here; each computes in one thread. All other processes of the
  mesh share the same two cores, so 1 cannot be reached.

The rewards come from benchmarks/slow_reward.py over gRPC, everything else is the mesh as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from rollmesh.client import Client
from rollmesh.config import read_yaml
from rollmesh.job import JobSpec, StepCompleted
from services.local.config import LocalConfig
from services.local.mesh import ROOT, mesh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.local.mesh import Mesh

JOBS = (1, 2, 4, 8)
WARM_UP_STEPS = 2
ACCELERATORS = ("sampler-0", "trainer-0")
TICK_S = 0.2


@dataclass
class Run:
    """K jobs: when each step of each was finished, and how busy the accelerators were when.

    `busy`: Unix seconds, and of each accelerator its processor time since it started.
    """

    num_jobs: int
    steps: dict[str, list[float]] = field(default_factory=dict)
    busy: list[tuple[float, tuple[float, ...]]] = field(default_factory=list)

    @property
    def window(self) -> tuple[float, float]:
        """In which all of them run."""
        begin = max(times[WARM_UP_STEPS - 1] for times in self.steps.values())
        return begin, min(times[-1] for times in self.steps.values())

    @property
    def steps_per_s(self) -> float:
        """Of all jobs together."""
        begin, end = self.window
        counted = sum(begin < at <= end for times in self.steps.values() for at in times)
        return counted / (end - begin)

    def busy_share(self, accelerator: int) -> float:
        """Of one accelerator in the window."""
        begin, end = self.window
        inside = [(at, seconds) for at, seconds in self.busy if begin <= at <= end]
        (first, before), (last, after) = inside[0], inside[-1]
        return (after[accelerator] - before[accelerator]) / (last - first)

    @property
    def busy_shares(self) -> list[float]:
        """Of each accelerator."""
        return [self.busy_share(index) for index in range(len(ACCELERATORS))]


def main() -> None:
    """Print the table and the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=15, help="of each job")
    parser.add_argument("--picture", type=Path, help="PNG of the busy shares over time")
    arguments = parser.parse_args()
    runs = asyncio.run(measure(arguments.steps))
    show(runs)
    if arguments.picture:
        draw(runs, arguments.picture)
    alone = runs[0].steps_per_s
    figures = {f"scaling_k{run.num_jobs}": round(run.steps_per_s / alone, 2) for run in runs[1:]}
    shares = runs[-1].busy_shares
    figures[f"busy_share_k{runs[-1].num_jobs}"] = round(sum(shares) / len(shares), 3)
    print(json.dumps(figures))  # noqa: T201


def settings() -> dict[str, Any]:
    """Of a mesh with one sampler and one trainer, one thread each."""
    config: dict[str, Any] = read_yaml(ROOT / "examples" / "local.yaml")
    for section in (*config["trainers"], *config["samplers"]):
        section["base_model"]["path"] = str(ROOT / "models" / "arith")
    for model in config["coordinator"]["base_models"]:
        model["tokenizer"] = str(ROOT / "models" / "arith")
    config["samplers"][0]["max_loras"] = max(JOBS)
    return config


def spec(steps: int, seed: int) -> JobSpec:
    """A job whose accelerators would idle: 8 groups of 4 completions a step, on-policy."""
    dataset = {"generator": {"name": "arithmetic", "parameters": {"split": "train", "count": 512}}}
    return JobSpec.parse(
        {
            "base_model": "arith",
            "dataset": dataset,
            "prompt": {"messages": [{"role": "user", "content": "{question}"}]},
            "reward": {"function": "exact_match", "reference": "{answer}"},
            "algorithm": {"groups_per_step": 8, "group_size": 4, "max_staleness": 0},
            "sampling": {"max_tokens": 8},
            "stop": {"max_steps": steps},
            "seed": seed,
        },
        source="benchmark",
    )


async def measure(steps: int) -> list[Run]:
    """A run of each number of jobs, one after the other on the same mesh."""
    config = LocalConfig.model_validate(settings())
    modules = {"reward": "benchmarks.slow_reward"}
    with tempfile.TemporaryDirectory() as folder:
        async with (
            mesh(config, Path(folder), modules=modules) as running,
            Client(running.address) as client,
        ):
            await _run(running, client, Run(1), 3)  # the first batches are slow
            runs = [Run(num_jobs) for num_jobs in JOBS]
            for run in runs:
                await _run(running, client, run, steps)
    return runs


async def _run(running: Mesh, client: Client, run: Run, steps: int) -> None:
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(_watch_processes(running, run))
        await asyncio.gather(*(_job(client, run, steps, index) for index in range(run.num_jobs)))
        watching.cancel()


async def _job(client: Client, run: Run, steps: int, index: int) -> None:
    job = await client.jobs.create(f"projects/tenant-{index}", spec(steps, seed=index))
    async for event in client.jobs.watch(job.name):
        if isinstance(event.event, StepCompleted):
            run.steps.setdefault(job.name, []).append(event.time)
    ended = await client.jobs.get(job.name)
    assert ended.state == "SUCCEEDED", ended.state_reason  # noqa: S101 - nothing to measure


async def _watch_processes(running: Mesh, run: Run) -> None:
    processes = [_computing(psutil.Process(running.members[name].pid)) for name in ACCELERATORS]
    while True:
        run.busy.append((time.time(), tuple(_processor_s(process) for process in processes)))
        await asyncio.sleep(TICK_S)


def _computing(process: psutil.Process) -> psutil.Process:
    """Where a member computes: itself, or vLLM's engine below it."""
    below = process.children(recursive=True)
    return max([process, *below], key=_processor_s)


def _processor_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def show(runs: Sequence[Run]) -> None:
    """A row for each number of jobs."""
    print(f"\n{'jobs':>5}{'steps/s':>10}{'of one':>8}{'sampler':>9}{'trainer':>9}  (busy)")  # noqa: T201
    for run in runs:
        sampler, trainer = run.busy_shares
        scaling = run.steps_per_s / runs[0].steps_per_s
        print(  # noqa: T201
            f"{run.num_jobs:5}{run.steps_per_s:10.2f}{scaling:8.2f}{sampler:9.2f}{trainer:9.2f}"
        )


def draw(runs: Sequence[Run], path: Path) -> None:
    """The busy share of each accelerator over time, a panel for each number of jobs."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only who draws needs it

    figure = Figure(figsize=(9, 1.6 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, sharey=True)
    for run, panel in zip(runs, panels, strict=True):
        begin, end = run.window
        inside = [(at, seconds) for at, seconds in run.busy if begin <= at <= end]
        for index, name in enumerate(ACCELERATORS):
            pairs = list(itertools.pairwise(inside))
            times = [after[0] - begin for _, after in pairs]
            shares = [
                (after[1][index] - before[1][index]) / (after[0] - before[0])
                for before, after in pairs
            ]
            panel.fill_between(times, shares, step="pre", alpha=0.45, label=name)
        panel.set(ylim=(0, 1.05), xlim=(0, end - begin), ylabel="busy")
        panel.set_title(
            f"{run.num_jobs} job{'s' * (run.num_jobs > 1)}: {run.steps_per_s:.2f} steps/s",
            fontsize=9,
            loc="left",
        )
    panels[0].legend(loc="upper right", fontsize=8)
    panels[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()

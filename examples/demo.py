"""From nothing to a trained adapter: starts a mesh, runs a job on it, exports what it has learned.

`python -m examples.demo`, or with a mesh and a job of your own `--config FILE --job FILE`. The exit
status is 0 where the job has succeeded; the default job must also have learned what it should.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from rollmesh.cli.export import export_peft
from rollmesh.cli.watch import watch
from rollmesh.client import Client
from rollmesh.errors import FailedPrecondition, MeshError
from rollmesh.job import Job, load_job_file
from services.local.config import LocalConfig
from services.local.mesh import mesh

CONFIG = Path("examples/local.yaml")
JOB = Path("examples/jobs/arithmetic.yaml")
BEFORE_BELOW, AFTER_AT_LEAST = 0.50, 0.90
"""Held-out accuracy of the default job: anything else, and it has not learned."""


def main() -> int:
    """Run it all; the exit status."""
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, help="the mesh (LocalConfig)")
    parser.add_argument("--job", type=Path, default=JOB, help="the job (JobSpec)")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(".rollmesh") / time.strftime("demo-%Y%m%d-%H%M%S"),
        help="folder for the adapter, logs and jobs",
    )
    arguments = parser.parse_args()
    try:
        job, adapter = asyncio.run(demo(arguments.config, arguments.job, arguments.state))
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped", file=sys.stderr)
        return 130
    before, after = job.first_evaluation, job.last_evaluation
    learned = True
    if before is not None and after is not None:
        reward = job.spec.reward
        kind = "accuracy" if reward and reward.function.endswith("_match") else "reward"
        print(
            f"held-out greedy {kind}: {before.reward_mean:.3f} before, "
            f"{after.reward_mean:.3f} after {after.step} steps"
        )
        learned = before.reward_mean < BEFORE_BELOW and after.reward_mean >= AFTER_AT_LEAST
    print(f"PEFT adapter: {adapter}")
    return 0 if learned or arguments.job != JOB else 1


async def demo(config_file: Path, job_file: Path, state_dir: Path) -> tuple[Job, Path]:
    """Run the job on a mesh of its own: the job, succeeded, and its adapter's PEFT folder."""
    # Ctrl-C cancels too; either way the mesh ends before this process does.
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - we run in one
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)

    config, spec = LocalConfig.load(config_file), load_job_file(job_file)
    print("starting a mesh; its sampler takes some ten seconds", flush=True)
    async with mesh(config, state_dir) as running, Client(running.address) as client:
        job = await client.jobs.create("projects/default", spec)
        await watch(client.jobs, job.name)
        job = await client.jobs.get(job.name)
        if job.state != "SUCCEEDED":
            raise FailedPrecondition(f"{job.name} is {job.state}: {job.state_reason}")
        parts = client.adapters.export(job.adapter)
        exported = await export_peft(parts, job.adapter, state_dir / "adapter")
    return job, exported.folder


if __name__ == "__main__":
    sys.exit(main())

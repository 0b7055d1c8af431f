"""`rollmesh job`."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rollmesh.cli.lines import evaluation_text
from rollmesh.cli.options import (
    ADDRESS,
    PROJECT,
    Address,
    JobName,
    Json,
    Project,
    ask,
    collect,
    job_name,
    parent_name,
)
from rollmesh.cli.output import (
    duration,
    local_time,
    one_line,
    print_fields,
    print_json,
    print_table,
)
from rollmesh.cli.watch import watch as show_events
from rollmesh.job import Job, QueueStatus, load_job_file

if TYPE_CHECKING:
    from rollmesh.client import Client

app = typer.Typer(no_args_is_help=True, help="Jobs: reinforcement learning that the mesh runs.")

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@app.command()
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The job, as YAML.")],
    job_id: Annotated[
        str, typer.Option("--id", metavar="ID", help="Id of the job; else one is made up.")
    ] = "",
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Then watch it until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Create the job in a file. With --watch the exit status is that of `watch`."""
    spec = load_job_file(file)
    parent = parent_name(project)
    job = ask(address, lambda client: client.jobs.create(parent, spec, job_id))
    if as_json:
        print_json(job)
    elif watch:
        typer.echo(f"{job.name} created")
    else:
        _print_job(job)
    if watch:
        _watch(job.name, address, as_json=as_json)


@app.command()
def get(
    job: JobName, address: Address = ADDRESS, project: Project = PROJECT, *, as_json: Json = False
) -> None:
    """Show one job."""
    _tell(address, lambda client: client.jobs.get(job_name(job, project)), as_json=as_json)


@app.command("list")
def list_(address: Address = ADDRESS, project: Project = PROJECT, *, as_json: Json = False) -> None:
    """List the jobs of a project, newest first."""
    parent = parent_name(project)
    jobs = ask(address, lambda client: collect(client.jobs.list(parent)))
    if as_json:
        print_json({"jobs": jobs})
        return
    print_table(
        ("NAME", "STATE", "STEP", "REWARD", "EVALUATION", "BASE MODEL", "CREATED"),
        (
            (
                job.name,
                f"{job.state} {job.queue.position}{_eta(job.queue)}: {job.queue.rule}"
                if job.queue
                else job.state,
                f"{job.step}/{job.spec.stop.max_steps}",
                f"{job.metrics['reward_mean']:.3f}" if "reward_mean" in job.metrics else "",
                _evaluations(job),
                job.spec.base_model,
                local_time(job.create_time),
            )
            for job in jobs
        ),
    )


@app.command()
def watch(
    job: JobName, address: Address = ADDRESS, project: Project = PROJECT, *, as_json: Json = False
) -> None:
    """Watch a job until it ends.

    A live view on a terminal, else one line an event. A lost connection is taken up again where
    it was lost. Exit status: 0 once the job has SUCCEEDED, 1 once it has FAILED or was CANCELLED.
    """
    _watch(job_name(job, project), address, as_json=as_json)


@app.command()
def pause(
    job: JobName, address: Address = ADDRESS, project: Project = PROJECT, *, as_json: Json = False
) -> None:
    """Stop a job after the step it is in; nothing is lost."""
    _tell(address, lambda client: client.jobs.pause(job_name(job, project)), as_json=as_json)


@app.command()
def resume(
    job: JobName, address: Address = ADDRESS, project: Project = PROJECT, *, as_json: Json = False
) -> None:
    """Go on with a paused job."""
    _tell(address, lambda client: client.jobs.resume(job_name(job, project)), as_json=as_json)


@app.command()
def cancel(
    job: JobName, address: Address = ADDRESS, project: Project = PROJECT, *, as_json: Json = False
) -> None:
    """End a job now; its adapter is kept."""
    _tell(address, lambda client: client.jobs.cancel(job_name(job, project)), as_json=as_json)


@app.command("export-metrics")
def export_metrics(
    job: JobName,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for TensorBoard's event files.")
    ] = None,
    mlflow: Annotated[
        str, typer.Option(metavar="URI", help="MLflow's tracking server, or sqlite:///FILE.")
    ] = "",
    wandb: Annotated[
        str, typer.Option(metavar="PROJECT", help="Project of Weights & Biases.")
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Until the job has ended.")] = False,
) -> None:
    """Write a job's metrics, evaluations and spec to TensorBoard, MLflow or Weights & Biases.

    What is there from an earlier export is not written again. Needs `rollmesh[metrics]`.
    """
    # Here, because --help needs none of it.
    from rollmesh.cli.export_metrics import export_metrics as export  # noqa: PLC0415

    name = job_name(job, project)
    try:
        ask(
            address,
            lambda client: export(
                client.jobs,
                name,
                tensorboard=tensorboard,
                mlflow=mlflow,
                wandb=wandb,
                follow_it=follow,
            ),
        )
    except KeyboardInterrupt:
        typer.echo("the same command goes on where this one ended", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _tell(address: str, question: Callable[["Client"], Awaitable[Job]], *, as_json: bool) -> None:
    job = ask(address, question)
    if as_json:
        print_json(job)
    else:
        _print_job(job)


def _watch(name: str, address: str, *, as_json: bool) -> None:
    try:
        state = ask(address, lambda client: show_events(client.jobs, name, as_json=as_json))
    except KeyboardInterrupt:
        typer.echo(f"the job goes on; `rollmesh job watch {name}` shows it again", err=True)
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(0 if state == "SUCCEEDED" else 1)


def _print_job(job: Job) -> None:
    print_fields(
        {
            "Name": job.name,
            "State": f"{job.state}: {one_line(job.state_reason)}"
            if job.state_reason
            else job.state,
            "Queue": _queue(job.queue) if job.queue else "",
            "Waits": "; ".join(map(one_line, job.problems)),
            "Step": f"{job.step}/{job.spec.stop.max_steps}",
            "Base model": job.spec.base_model,
            "Adapter": job.adapter,
            "First evaluation": evaluation_text(job.first_evaluation)
            if job.first_evaluation
            else "",
            "Newest evaluation": evaluation_text(job.last_evaluation)
            if job.last_evaluation
            else "",
            "Metrics": ", ".join(f"{name} {value:.4g}" for name, value in job.metrics.items()),
            "Created": local_time(job.create_time),
            "Changed": local_time(job.update_time),
        }
    )


def _queue(queue: QueueStatus) -> str:
    return f"place {queue.position}{_eta(queue)}: {queue.rule}, {one_line(queue.reason)}"


def _eta(queue: QueueStatus) -> str:
    """When it may begin, as far as that can be said."""
    if queue.eta_low_s is None and queue.eta_high_s is None:
        return ""
    low = duration(queue.eta_low_s or 0.0)
    if queue.eta_high_s is None:
        return f", in {low} or later"
    return f", in {low} to {duration(queue.eta_high_s)}"


def _evaluations(job: Job) -> str:
    """Held-out reward at first and now."""
    if job.first_evaluation is None or job.last_evaluation is None:
        return ""
    return f"{job.first_evaluation.reward_mean:.3f} → {job.last_evaluation.reward_mean:.3f}"

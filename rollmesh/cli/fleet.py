"""`rollmesh fleet`."""

from typing import Annotated

import typer

from rollmesh import types
from rollmesh.cli.options import (
    ADDRESS,
    PROJECT,
    Address,
    Json,
    Project,
    ask,
    job_name,
    parent_name,
)
from rollmesh.cli.output import local_time, one_line, print_json, print_table
from rollmesh.names import parse_project

app = typer.Typer(invoke_without_command=True, help="The members of the mesh, and its schedule.")

Subject = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        help="A job: id, or projects/P/jobs/J; or a request, projects/P/requests/R.",
    ),
]


@app.callback()
def fleet(context: typer.Context, address: Address = ADDRESS, *, as_json: Json = False) -> None:
    """Show the members of the mesh and their load."""
    if context.invoked_subcommand:
        _check_no_options(context)
        return
    answer = ask(address, lambda client: client.fleet.get())
    if as_json:
        print_json(answer)
        return
    print_table(
        ("ROLE", "ADDRESS", "STATE", "BASE MODEL", "BACKEND", "ADAPTERS", "RUNNING"),
        (
            (
                member.role,
                member.address,
                state_of(member),
                member.base_model,
                member.backend,
                str(member.num_adapters) if member.base_model else "",
                str(member.num_running) if member.role in {"sampler", "environment"} else "",
            )
            for member in answer.members
        ),
    )
    typer.echo(f"{answer.num_queued_requests} sample requests wait in the coordinator")


@app.command()
def explain(
    subject: Subject = "",
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """Show why what waits in a project waits, what was decided, and its shares and quotas."""
    parent, name = _named(subject, project)
    answer = ask(address, lambda client: client.fleet.explain(parent, name))
    if as_json:
        print_json(answer)
        return
    _print_waiting(answer)
    if answer.decisions:
        typer.echo()
        _print_decisions(answer)
    if answer.shares:
        typer.echo()
        _print_shares(answer)
    if answer.quotas:
        typer.echo()
        _print_quotas(answer)


def _check_no_options(context: typer.Context) -> None:
    """Refuse options before the subcommand, which has its own and would not see them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source and source.name == "COMMANDLINE":
            option = parameter.opts[0]
            raise typer.BadParameter(
                f"{option} goes after the subcommand: rollmesh fleet {context.invoked_subcommand} "
                f"{option} …",
                param_hint=option,
            )


def _named(subject: str, project: str) -> tuple[str, str]:
    """Resource names of the project and of the subject; a short one is a job's id."""
    if "/" not in subject:
        return parent_name(project), job_name(subject, project) if subject else ""
    parent = "/".join(subject.split("/")[:2])
    parse_project(parent, field="subject")
    return parent, subject


def _print_waiting(answer: types.Schedule) -> None:
    if not answer.waiting:
        typer.echo("nothing waits")
        return
    for waiting in answer.waiting:
        since = local_time(waiting.since)
        typer.echo(f"{waiting.position}. {waiting.subject}, since {since}")
        typer.echo(f"   {waiting.rule}: {one_line(waiting.reason)}")
        typer.echo(f"   waits for {one_line(waiting.release)}")
    typer.echo(f"{len(answer.waiting)} of {answer.num_waiting} that wait are shown")


def _print_decisions(answer: types.Schedule) -> None:
    for decision in answer.decisions:
        where = f" at {decision.address}" if decision.address else ""
        typer.echo(
            f"{local_time(decision.time)} {decision.action} {decision.subject}{where}: "
            f"{one_line(decision.reason)}"
        )


def _print_shares(answer: types.Schedule) -> None:
    print_table(
        ("BASE MODEL", "WEIGHT", "ENTITLED", "VIRTUAL TOKENS", "QUEUED", "RUNNING"),
        (
            (
                share.base_model,
                f"{share.weight:g}",
                f"{share.entitled:.1%}",
                f"{share.virtual_tokens:,.0f}",
                str(share.num_queued),
                str(share.num_running),
            )
            for share in answer.shares
        ),
    )


def _print_quotas(answer: types.Schedule) -> None:
    print_table(
        ("QUOTA", "USED", "ALLOWED"),
        (
            (
                quota.name,
                f"{quota.used:,}",
                "no bound" if quota.allowed is None else f"{quota.allowed:,}",
            )
            for quota in answer.quotas
        ),
    )


def state_of(member: types.Member) -> str:
    """Whether it serves, and what is the matter with it."""
    state = "serving" if member.serving else "not serving"
    return f"{state}: {one_line(member.problem)}" if member.problem else state

"""`rollmesh environment`."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rollmesh.chat import EnvironmentInfo
from rollmesh.cli.fleet import state_of
from rollmesh.cli.options import ADDRESS, Address, Json, ask
from rollmesh.cli.output import one_line, print_fields, print_json, print_table

if TYPE_CHECKING:
    from rollmesh.client import EnvironmentClient
    from rollmesh.environment.conformance import Report, Verdict

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Environments: serve, check and play them.")

Server = Annotated[
    str, typer.Argument(metavar="HOST:PORT", help="Where it is, or a reward service that knows it.")
]
Name = Annotated[
    str, typer.Option("--environment", metavar="NAME", help="Which, where there are several.")
]

_COLORS = {"passed": "green", "failed": "bold red", "skipped": "dim"}


@app.command()
def check(
    server: Server,
    environment: Name = "",
    episodes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Open so many at once, where its limit allows.")
    ] = 1_000,
    answer_s: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds in which answers have to come.")
    ] = 10.0,
    pid: Annotated[
        int | None,
        typer.Option(min=1, help="Of its process, if that is here: its memory is checked too."),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Check whether an environment, in whatever language, does what the contract says."""
    from rollmesh.environment.conformance import check as judge  # noqa: PLC0415

    tell = (lambda *_: None) if as_json else _tell
    reports = asyncio.run(
        judge(
            server,
            environment=environment,
            answer_s=answer_s,
            num_episodes=episodes,
            pid=pid,
            tell=tell,
        )
    )
    if as_json:
        print_json({"environments": reports})
    else:
        _print_reports(reports)
    if not all(report.passed for report in reports):
        raise typer.Exit(1)


@app.command("list")
def list_(address: Address = ADDRESS, *, as_json: Json = False) -> None:
    """Show the environments that the mesh knows, by the names that jobs call them."""
    fleet = ask(address, lambda client: client.fleet.get())
    members = [member for member in fleet.members if member.role == "environment"]
    if as_json:
        print_json({"environments": members})
        return
    print_table(
        ("NAME", "STATE", "RUNNING"),
        ((member.address, state_of(member), str(member.num_running)) for member in members),
    )


@app.command()
def describe(server: Server, *, as_json: Json = False) -> None:
    """Show the environments of a server."""
    infos = _ask(server, lambda client: client.describe())
    if as_json:
        print_json({"environments": infos})
        return
    for info in infos:
        print_fields(_fields(info))
        if info.tools:
            print_table(
                ("TOOL", "WHAT IT DOES", "ARGUMENTS"),
                (
                    (tool.name, one_line(tool.description), one_line(tool.parameters_schema_json))
                    for tool in info.tools
                ),
            )


@app.command()
def play(
    server: Server,
    environment: Name = "",
    task: Annotated[
        str, typer.Option(metavar="ID", help="The task; else the first of the first split.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of everything random in it.")] = 0,
) -> None:
    """Play an episode, or answer a single turn, in the place of the model."""
    from rollmesh.cli.environment_play import play as play_it  # noqa: PLC0415

    _ask(server, lambda client: play_it(client, environment, task, seed))


@app.command()
def serve(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="gymnasium:ID, verifiers:ID or openenv:URL; their packages are the extra "
            "`environments`.",
        ),
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Port 0: a free one.")
    ] = "127.0.0.1:0",
    tasks: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tasks of a split, where it has no own.")
    ] = 4_096,
    max_turns: Annotated[int, typer.Option(min=1, metavar="N", help="Actions of an episode.")] = 64,
) -> None:
    """Serve an environment of another framework, until told to end."""
    from rollmesh.environment import run  # noqa: PLC0415
    from rollmesh.environment.adapters import adapted  # noqa: PLC0415

    run(adapted(spec, num_tasks=tasks, max_turns=max_turns), listen=listen)


def _ask(server: str, question: Callable[["EnvironmentClient"], Awaitable[T]]) -> T:
    # Here, because grpc takes half a second to import and --help needs none of it.
    from rollmesh.client import EnvironmentClient  # noqa: PLC0415
    from rollmesh.rpc.channel import channel  # noqa: PLC0415

    async def answer() -> T:
        async with channel(server) as opened:
            return await question(EnvironmentClient(opened))

    return asyncio.run(answer())


def _fields(info: EnvironmentInfo) -> dict[str, str]:
    limits = info.limits
    bounds = {
        "episodes at once": limits.max_concurrent_episodes,
        "answers in a batch": limits.max_score_batch,
        "actions of an episode": limits.max_turns,
    }
    does = {"single turns": info.has_score, "episodes": info.has_episodes}
    return {
        "Environment": info.name,
        "Version": one_line(info.version),
        "Description": one_line(info.description),
        "Has": ", ".join(name for name, has in does.items() if has),
        "Observations": ", ".join(info.observation_kinds),
        "Deterministic": "yes" if info.deterministic else "not promised",
        "At most": ", ".join(f"{value:,} {name}" for name, value in bounds.items() if value),
        "Answers within": "" if limits.max_answer_s is None else f"{limits.max_answer_s:g} s",
        "Splits": ", ".join(
            f"{split.name} ({split.num_tasks:,} tasks)" if split.num_tasks else split.name
            for split in info.splits
        ),
    }


def _tell(environment: str, verdict: "Verdict") -> None:
    """One verdict, as soon as it is reached."""
    line = Text.assemble(
        f"{environment} ",
        (verdict.outcome, _COLORS[verdict.outcome]),
        f" {verdict.rule}",
        (f" ({verdict.seconds:.1f} s)", "dim"),
    )
    Console(stderr=True).print(line)


def _print_reports(reports: "list[Report]") -> None:
    for report in reports:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("RULE", "VERDICT", "WHY"):
            table.add_column(column, overflow="fold")
        for verdict in report.verdicts:
            if verdict.skipped_with:
                continue
            color = _COLORS[verdict.outcome]
            why = Text(one_line(verdict.reason or verdict.text), style=color)
            table.add_row(verdict.rule, Text(verdict.outcome, style=color), why)
        for rule, number in Counter(each.skipped_with for each in report.verdicts).items():
            if rule:
                why = Text(f"{number} rules make no sense without {rule}", style="dim")
                table.add_row("…", Text("skipped", style="dim"), why)
        console = Console()
        console.print(table)
        counts = {
            outcome: sum(verdict.outcome == outcome for verdict in report.verdicts)
            for outcome in _COLORS
        }
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        console.print(Text(f"{report.environment}: {told}\n", style="bold"))

"""`rollmesh fleet`."""

import typer

from rollmesh import types
from rollmesh.cli.options import ADDRESS, Address, Json, ask
from rollmesh.cli.output import one_line, print_json, print_table


def fleet(address: Address = ADDRESS, *, as_json: Json = False) -> None:
    """Show the members of the mesh and their load."""
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
                _state(member),
                member.base_model,
                member.backend,
                str(member.num_adapters) if member.base_model else "",
                str(member.num_running) if member.role == "sampler" else "",
            )
            for member in answer.members
        ),
    )
    typer.echo(f"{answer.num_queued_requests} sample requests wait in the coordinator")


def _state(member: types.Member) -> str:
    state = "serving" if member.serving else "not serving"
    return f"{state}: {one_line(member.problem)}" if member.problem else state

"""`rollmesh project`."""

from typing import Annotated

import typer

from rollmesh.cli.options import (
    ADDRESS,
    Address,
    Json,
    ask,
    parent_name,
)
from rollmesh.cli.output import local_time, print_fields, print_json, print_table
from rollmesh.names import key_name, parse_key, parse_project

app = typer.Typer(no_args_is_help=True, help="Projects: who shares the mesh.")
keys = typer.Typer(no_args_is_help=True, help="Keys: secrets that let their holders in.")
app.add_typer(keys, name="key")

ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="Id, or projects/P.")]
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="projects/P/keys/K.")]


@keys.command()
def create(
    project: ProjectName,
    note: Annotated[str, typer.Option(metavar="TEXT", help="What it is for.")] = "",
    address: Address = ADDRESS,
    *,
    as_json: Json = False,
) -> None:
    """Make a key of a project and show its secret, which nobody can see again."""
    parent = _parent(project)
    key, secret = ask(address, lambda client: client.keys.create(parent, note))
    if as_json:
        print_json({"key": key, "secret": secret})
        return
    print_fields({"Key": key.name, "Note": key.note, "Created": local_time(key.create_time)})
    typer.echo("Secret, shown this once:")
    # As it is, for whoever copies it: a table would fold it in a narrow window.
    typer.echo(secret)


@keys.command("list")
def list_(project: ProjectName, address: Address = ADDRESS, *, as_json: Json = False) -> None:
    """List the keys of a project, the oldest first, without their secrets."""
    parent = _parent(project)
    found = ask(address, lambda client: client.keys.list(parent))
    if as_json:
        print_json({"keys": found})
        return
    print_table(
        ("NAME", "SECRET", "CREATED", "NOTE"),
        ((key.name, f"{key.prefix}…", local_time(key.create_time), key.note) for key in found),
    )


@keys.command()
def delete(name: KeyName, address: Address = ADDRESS, *, as_json: Json = False) -> None:
    """Delete a key, whose secret lets nobody in any more."""
    key = key_name(*parse_key(name))
    ask(address, lambda client: client.keys.delete(key))
    if as_json:
        print_json({"deleted": key})
        return
    print_fields({"Deleted": key})


def _parent(project: str) -> str:
    return parent_name(parse_project(project, field="project") if "/" in project else project)

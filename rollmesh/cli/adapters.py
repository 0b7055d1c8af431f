"""`rollmesh adapter`."""

from pathlib import Path
from typing import Annotated

import typer

from rollmesh.cli.export import export_peft
from rollmesh.cli.options import (
    ADDRESS,
    PROJECT,
    AdapterName,
    Address,
    Json,
    Project,
    adapter_name,
    ask,
    collect,
    parent_name,
)
from rollmesh.cli.output import local_time, print_fields, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Adapters: what jobs train.")


@app.command("list")
def list_(address: Address = ADDRESS, project: Project = PROJECT, *, as_json: Json = False) -> None:
    """List the adapters of a project by name."""
    parent = parent_name(project)
    adapters = ask(address, lambda client: collect(client.adapters.list(parent)))
    if as_json:
        print_json({"adapters": adapters})
        return
    print_table(
        ("NAME", "BASE MODEL", "RANK", "VERSION", "PUBLISHED", "CREATED"),
        (
            (
                adapter.name,
                adapter.base_model,
                str(adapter.lora.rank),
                str(adapter.policy_version),
                "" if adapter.published_version is None else str(adapter.published_version),
                local_time(adapter.create_time),
            )
            for adapter in adapters
        ),
    )


@app.command()
def export(
    adapter: AdapterName,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="The PEFT folder to make; must not exist yet.")
    ],
    version: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="A published version; else the newest.")
    ] = None,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """Write an adapter as a PEFT folder, which is put in place only once its digest is verified."""
    name = adapter_name(adapter, project)
    exported = ask(address, lambda client: export_peft(client.adapters, name, output, version))
    if as_json:
        print_json(exported)
        return
    print_fields(
        {
            "Folder": str(exported.folder),
            "Adapter": exported.adapter,
            "Version": str(exported.policy_version),
            "Base model": exported.base_model,
            "Digest": exported.digest,
        }
    )


@app.command()
def delete(
    adapter: AdapterName,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """Delete an adapter with all its versions, which frees its place on the trainer."""
    name = adapter_name(adapter, project)
    ask(address, lambda client: client.adapters.delete(name))
    if as_json:
        print_json({"deleted": name})
        return
    print_fields({"Deleted": name})

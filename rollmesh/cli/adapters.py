"""`rollmesh adapter`."""

from typing import Annotated

import typer

from rollmesh.cli.export import export_peft, print_exported
from rollmesh.cli.options import (
    ADDRESS,
    PROJECT,
    AdapterName,
    Address,
    CheckpointName,
    Folder,
    Json,
    Project,
    adapter_name,
    ask,
    checkpoint_name,
    collect,
    parent_name,
    seconds_of,
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
    output: Folder,
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
    exported = ask(
        address, lambda client: export_peft(client.adapters.export(name, version), name, output)
    )
    if as_json:
        print_json(exported)
        return
    print_exported(exported)


@app.command()
def fork(
    adapter: AdapterName,
    checkpoint: CheckpointName,
    idle_ttl: Annotated[
        str,
        typer.Option(metavar="TIME", help="Delete it after so long without use, such as 12h."),
    ] = "",
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="Take over the optimizer state too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a new adapter of a checkpoint, which may be any adapter's of the project."""
    name = adapter_name(adapter, project)
    source = checkpoint_name(checkpoint, project)
    idle_ttl_s = seconds_of(idle_ttl, field="idle-ttl")
    made = ask(
        address,
        lambda client: client.adapters.fork(
            name, source, with_optimizer=with_optimizer, idle_ttl_s=idle_ttl_s
        ),
    )
    if as_json:
        print_json(made)
        return
    print_fields(
        {
            "Adapter": made.name,
            "Forked from": source,
            "Base model": made.base_model,
            "Rank": str(made.lora.rank),
            "Created": local_time(made.create_time),
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

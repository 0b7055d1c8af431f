"""`rollmesh checkpoint`."""

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
    seconds_of,
)
from rollmesh.cli.output import local_time, print_fields, print_json, print_table
from rollmesh.types import Checkpoint

app = typer.Typer(no_args_is_help=True, help="Checkpoints: adapters kept as they were.")


@app.command()
def create(
    checkpoint: CheckpointName,
    ttl: Annotated[
        str, typer.Option(metavar="TIME", help="Delete it after so long, such as 12h or 7d.")
    ] = "",
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """Keep an adapter as it is now."""
    name = checkpoint_name(checkpoint, project)
    ttl_s = seconds_of(ttl, field="ttl")
    _tell(ask(address, lambda client: client.checkpoints.create(name, ttl_s=ttl_s)), as_json)


@app.command("list")
def list_(
    adapter: AdapterName,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """List the checkpoints of an adapter by name; it may be deleted by now."""
    parent = adapter_name(adapter, project)
    checkpoints = ask(address, lambda client: collect(client.checkpoints.list(parent)))
    if as_json:
        print_json({"checkpoints": checkpoints})
        return
    print_table(
        ("ID", "VERSION", "BYTES", "CREATED", "EXPIRES"),
        (
            (
                checkpoint.name.rpartition("/")[2],  # the others are what was asked for
                str(checkpoint.policy_version),
                f"{checkpoint.num_bytes:,}",
                local_time(checkpoint.create_time),
                _expiry(checkpoint),
            )
            for checkpoint in checkpoints
        ),
    )


@app.command()
def show(
    checkpoint: CheckpointName,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """Show one checkpoint."""
    name = checkpoint_name(checkpoint, project)
    _tell(ask(address, lambda client: client.checkpoints.get(name)), as_json)


@app.command()
def delete(
    checkpoint: CheckpointName,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """Delete a checkpoint; adapters that were made of it stay as they are."""
    name = checkpoint_name(checkpoint, project)
    ask(address, lambda client: client.checkpoints.delete(name))
    if as_json:
        print_json({"deleted": name})
        return
    print_fields({"Deleted": name})


@app.command()
def export(
    checkpoint: CheckpointName,
    output: Folder,
    address: Address = ADDRESS,
    project: Project = PROJECT,
    *,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a PEFT folder, put in place only once its digest is verified."""
    name = checkpoint_name(checkpoint, project)
    exported = ask(
        address, lambda client: export_peft(client.checkpoints.export(name), name, output)
    )
    if as_json:
        print_json(exported)
        return
    print_exported(exported)


def _tell(checkpoint: Checkpoint, as_json: bool) -> None:  # noqa: FBT001
    if as_json:
        print_json(checkpoint)
        return
    print_fields(
        {
            "Checkpoint": checkpoint.name,
            "Base model": checkpoint.base_model,
            "Rank": str(checkpoint.lora.rank),
            "Version": str(checkpoint.policy_version),
            "Digest": checkpoint.digest,
            "Bytes": f"{checkpoint.num_bytes:,}",
            "Created": local_time(checkpoint.create_time),
            "Expires": _expiry(checkpoint),
        }
    )


def _expiry(checkpoint: Checkpoint) -> str:
    return "" if checkpoint.expire_time is None else local_time(checkpoint.expire_time)

"""An export as a PEFT folder on disk: verified first, then put in place as a whole."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rollmesh.cli.output import print_fields
from rollmesh.digest import safetensors_digest
from rollmesh.errors import AlreadyExists, DigestMismatch, Unavailable
from rollmesh.types import AdapterExport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """A PEFT folder, and what is in it."""

    folder: Path
    adapter: str
    policy_version: int
    base_model: str
    digest: str


async def export_peft(
    parts: AsyncIterator[AdapterExport | bytes | str], name: str, folder: Path
) -> ExportedAdapter:
    """Write what is exported of `name`, an adapter or checkpoint, to `folder`: new or empty.

    `parts` are a header, chunks of adapter_model.safetensors, and the digest.

    Raises:
        AlreadyExists: there is something at `folder`.
        DigestMismatch: the bytes that came are not those announced; nothing is left behind.
        Unavailable: the transfer was cut off.
    """
    with _becoming(folder) as partial:
        header, digest = await _receive(parts, name, partial)
        _verify(partial / "adapter_model.safetensors", header, digest)
    return ExportedAdapter(folder, header.adapter, header.policy_version, header.base_model, digest)


def print_exported(exported: ExportedAdapter) -> None:
    """What was exported, for people."""
    print_fields(
        {
            "Folder": str(exported.folder),
            "Adapter": exported.adapter,
            "Version": str(exported.policy_version),
            "Base model": exported.base_model,
            "Digest": exported.digest,
        }
    )


@contextlib.contextmanager
def _becoming(folder: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `folder` as a whole, or vanishes if the block fails."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise AlreadyExists(f"{folder} exists already", field="output", value=folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that renaming it copies nothing.
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


async def _receive(
    parts: AsyncIterator[AdapterExport | bytes | str], name: str, folder: Path
) -> tuple[AdapterExport, str]:
    """Write the files into `folder`; the header and the digest that was promised."""
    header: AdapterExport | None = None
    digest = ""
    with (folder / "adapter_model.safetensors").open("wb") as weights:
        async for part in parts:
            match part:
                case AdapterExport():
                    header = part
                case bytes():
                    weights.write(part)
                case str():
                    digest = part
    if header is None or not digest:
        raise Unavailable(f"the transfer of {name} ended before its last part", resource=name)
    (folder / "adapter_config.json").write_text(header.adapter_config_json, encoding="utf-8")
    return header, digest


def _verify(weights: Path, header: AdapterExport, digest: str) -> None:
    if weights.stat().st_size != header.num_bytes:
        raise DigestMismatch(
            f"{header.adapter}: {weights.stat().st_size} bytes came, announced were "
            f"{header.num_bytes}; nothing was written",
            resource=header.adapter,
        )
    try:
        found = safetensors_digest(weights.read_bytes())
    except ValueError as error:
        found = f"none ({error})"
    if found != digest:
        raise DigestMismatch(
            f"{header.adapter}: what came has the digest {found}, announced was {digest}; "
            "nothing was written",
            resource=header.adapter,
            value=found,
            allowed=digest,
        )

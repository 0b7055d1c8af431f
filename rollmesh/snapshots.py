"""How an adapter's snapshot lies in the blob store: written by trainers, read without torch too.

Under the snapshot's key, `snapshots/` and 32 hexadecimal digits:

    {key}/adapter    adapter_model.safetensors of a PEFT folder: the weights, float32
    {key}/state      safetensors: the moments of AdamW, and the pending gradients where there are
    {key}/manifest   JSON, written last: the counters, adapter_config.json, sha256 and size of both

A snapshot's digest is the sha256 of its manifest, so that it vouches for every byte. What has no
manifest is no snapshot.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollmesh.errors import DigestMismatch, FailedPrecondition, InvalidRequest
from rollmesh.types import LoraConfig, Snapshot

if TYPE_CHECKING:
    from rollmesh.blobs import Blobs

FileName = Literal["adapter", "state"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_KEY = re.compile(r"snapshots/[0-9a-f]{32}")
_FILES: tuple[FileName, ...] = ("adapter", "state")
_MANIFEST = "manifest"


class StoredFile(BaseModel):
    """One file of a snapshot."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    sha256: Sha256

    @classmethod
    def of(cls, content: bytes) -> StoredFile:
        """Of a file with this content."""
        return cls(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class Shape(BaseModel):
    """types.LoraConfig with its defaults filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    seed: int

    def lora(self) -> LoraConfig:
        """The same as a value."""
        return LoraConfig(self.rank, self.alpha, self.target_modules, self.seed)


class Manifest(BaseModel):
    """What a snapshot is of. `adam_step`: steps that the moments have seen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    adapter: str
    base_model: str
    lora: Shape
    policy_version: int
    next_sequence: int
    adam_step: int
    has_pending_gradients: bool
    adapter_config_json: str
    weights_digest: Sha256
    files: dict[FileName, StoredFile]

    def encode(self) -> bytes:
        """The file's content."""
        return self.model_dump_json(indent=2).encode()

    def snapshot(self, key: str) -> Snapshot:
        """The value that says where it lies and what it must be."""
        content = self.encode()
        return Snapshot(
            key=key,
            digest=hashlib.sha256(content).hexdigest(),
            next_sequence=self.next_sequence,
            policy_version=self.policy_version,
            num_bytes=len(content) + sum(file.num_bytes for file in self.files.values()),
            weights_digest=self.weights_digest,
        )


def blob_keys(key: str) -> tuple[str, ...]:
    """The keys of a snapshot's blobs, in the order in which to delete them: the manifest first."""
    return (f"{key}/{_MANIFEST}", *(f"{key}/{name}" for name in _FILES))


def write_snapshot(
    blobs: Blobs, key: str, manifest: Manifest, files: dict[FileName, bytes]
) -> Snapshot:
    """Store `files` and then `manifest`, which describes them, under a new key.

    Raises:
        Unavailable: the blob store does not answer.
    """
    for name, content in files.items():
        blobs.write(f"{key}/{name}", content)
    blobs.write(f"{key}/{_MANIFEST}", manifest.encode())
    return manifest.snapshot(key)


def read_manifest(blobs: Blobs, snapshot: Snapshot) -> Manifest:
    """The manifest of a snapshot, verified.

    Raises:
        InvalidRequest: the key has another form.
        NotFound: the snapshot is gone.
        DigestMismatch: it is another.
        FailedPrecondition: another format, that of another release.
    """
    if not _KEY.fullmatch(snapshot.key):
        raise InvalidRequest(
            f"snapshot.key: {snapshot.key!r} is not the key of a snapshot",
            field="snapshot.key",
            value=snapshot.key,
            allowed=_KEY.pattern,
        )
    content = blobs.read(f"{snapshot.key}/{_MANIFEST}")
    _check(f"{snapshot.key}/{_MANIFEST}", content, snapshot.digest)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise FailedPrecondition(
            f"{snapshot.key} is a snapshot of another format: {error}", resource=snapshot.key
        ) from None


def read_file(blobs: Blobs, snapshot: Snapshot, manifest: Manifest, name: FileName) -> bytes:
    """One file of a snapshot, verified.

    Raises:
        NotFound: the snapshot is gone.
        DigestMismatch: the file is not what was written.
    """
    key = f"{snapshot.key}/{name}"
    content = blobs.read(key)
    _check(key, content, manifest.files[name].sha256)
    return content


def _check(key: str, content: bytes, wanted: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise DigestMismatch(
            f"{key} has {len(content)} bytes with sha256 {found}, wanted is {wanted}",
            resource=key,
            value=found,
            allowed=wanted,
        )

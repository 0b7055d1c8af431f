"""How a published version lies in the blob store: written by trainers, read by samplers.

One blob that says all about itself, under `versions/` and 32 hexadecimal digits:

    8 bytes      length of the header, little-endian
    32 bytes     sha256 of the header
    the header   JSON: what AdapterExport has, and the digest of the tensors
    the rest     adapter_model.safetensors

The tensors' digest vouches for the rest, but not for adapter_config.json: hence the header's own.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rollmesh.errors import DigestMismatch, InvalidRequest
from rollmesh.types import AdapterExport

if TYPE_CHECKING:
    from rollmesh.blobs import Blobs

_KEY = re.compile(r"versions/[0-9a-f]{32}")
_PREFIX_BYTES = 40
_FIRST_BYTES = 64 * 1024
"""Read at once: more than any header has that a trainer makes."""


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    adapter: str
    policy_version: int
    base_model: str
    adapter_config_json: str
    num_bytes: int
    digest: str


def export_key(new_id: str) -> str:
    """The key of a version's blob; `new_id`: 32 hexadecimal digits that were never used before."""
    return f"versions/{new_id}"


def check_export_key(key: str, *, field: str) -> None:
    """Refuse what `export_key` cannot have made."""
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"{field}: {key!r} is not the key of a version",
            field=field,
            value=key,
            allowed=_KEY.pattern,
        )


def write_export(blobs: Blobs, key: str, export: AdapterExport, digest: str, file: bytes) -> None:
    """Store a version under a new key.

    Raises:
        Unavailable: the blob store does not answer.
    """
    header = (
        _Header(
            adapter=export.adapter,
            policy_version=export.policy_version,
            base_model=export.base_model,
            adapter_config_json=export.adapter_config_json,
            num_bytes=export.num_bytes,
            digest=digest,
        )
        .model_dump_json()
        .encode()
    )
    length = len(header).to_bytes(8, "little")
    blobs.write(key, length, hashlib.sha256(header).digest(), header, file)


class StoredExport:
    """A version's blob whose header was read and verified; every method blocks.

    Raises:
        InvalidRequest: the key has another form.
        NotFound: there is no such blob.
        DigestMismatch: its header is not what was written.
        Unavailable: the blob store does not answer.
    """

    def __init__(self, blobs: Blobs, key: str) -> None:
        check_export_key(key, field="source.export_key")
        self._blobs = blobs
        self._key = key
        first = blobs.read(key, 0, _FIRST_BYTES)
        self._start = _PREFIX_BYTES + int.from_bytes(first[:8], "little")
        header = first[_PREFIX_BYTES : self._start]
        if hashlib.sha256(header).digest() != first[8:_PREFIX_BYTES]:
            raise self._spoilt("its header was changed")
        try:
            found = _Header.model_validate_json(header)
        except ValidationError as error:
            raise self._spoilt(f"its header has another format: {error}") from None
        self.digest = found.digest
        self.export = AdapterExport(
            found.adapter,
            found.policy_version,
            found.base_model,
            found.adapter_config_json,
            found.num_bytes,
        )

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes of adapter_model.safetensors from `start` on; none: its end."""
        return self._blobs.read(self._key, self._start + start, self._start + start + size)

    def _spoilt(self, why: str) -> DigestMismatch:
        return DigestMismatch(f"the blob {self._key} is no version: {why}", resource=self._key)

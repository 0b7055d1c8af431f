"""One version from one place, until it is all here and verified, or the place is given up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollmesh.digest import safetensors_digest
from rollmesh.errors import DigestMismatch, InvalidRequest, MeshError, NotFound, SourceUnavailable
from rollmesh.types import AdapterExport, AdapterSource

if TYPE_CHECKING:
    from collections.abc import Awaitable

log = logging.getLogger(__name__)

Part = AdapterExport | bytes | str
"""A transfer is a header, then chunks of adapter_model.safetensors, then the tensors' digest."""

Parts = Callable[[AdapterSource, int], AsyncGenerator[Part, None]]
"""What comes of a version from a place; of its file, what is after so many bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """A version that came, verified: the two files of a PEFT folder."""

    export: AdapterExport
    file: bytearray


class _BrokenOffError(Exception):
    """A transfer ended before its end, or did not begin; it may go on from there."""


class Download:
    """What has come of a version from one place.

    Attributes:
        error: why it is not complete.
        given_up: the place will never bring it.
    """

    def __init__(
        self,
        place: str,
        parts: Parts,
        source: AdapterSource,
        admit: Callable[[AdapterExport], Awaitable[None]],
        stall_s: float,
    ) -> None:
        self.error: MeshError = SourceUnavailable(f"{place}: was not asked")
        self.given_up = False
        self._place = place
        self._parts = parts
        self._source = source
        self._admit = admit
        self._stall_s = stall_s
        self._export: AdapterExport | None = None
        self._file = bytearray()
        self._spoilt = False
        """Something else than asked for came once."""

    async def run(self) -> Transfer | None:
        """Go on for as long as anything comes; None: see `error`."""
        while True:
            before = len(self._file)
            try:
                return await self._go_on()
            except _BrokenOffError as error:
                self.error = SourceUnavailable(
                    f"{self._place}: {error}, after {len(self._file)} bytes", resource=self._place
                )
                if len(self._file) == before:
                    return None
                log.info("%s; goes on", self.error)
            except NotFound as error:
                self._give_up(NotFound(f"{self._place}: {error}", **error.context))
                return None
            except DigestMismatch as error:
                log.warning("%s: %s", self._place, error)
                self.error = DigestMismatch(f"{self._place}: {error}", **error.context)
                if self._spoilt:
                    self._give_up(self.error)
                self._spoilt = True
                self._export = None
                self._file = bytearray()
                return None

    def _give_up(self, error: MeshError) -> None:
        self.error = error
        self.given_up = True
        self._file = bytearray()

    async def _go_on(self) -> Transfer:
        """One call to the place, for what is not here yet."""
        source, digest = self._source, None
        async with contextlib.aclosing(self._parts(source, len(self._file))) as parts:
            export = await self._header(parts)
            while (part := await self._next(parts)) is not None:
                if isinstance(part, str):
                    digest = part
                elif isinstance(part, AdapterExport) or (
                    len(self._file) + len(part) > export.num_bytes
                ):
                    raise _other("more comes than the header says")
                else:
                    self._file += part
        if digest is None:
            raise _BrokenOffError("the transfer broke off")
        if digest != source.digest:
            raise _other("it has other tensors", value=digest, allowed=source.digest)
        if len(self._file) != export.num_bytes:
            raise _other(
                "less comes than the header says", value=len(self._file), allowed=export.num_bytes
            )
        found = await asyncio.to_thread(_digest, self._file)
        if found != source.digest:
            raise _other("the tensors were changed", value=found, allowed=source.digest)
        return Transfer(export, self._file)

    async def _header(self, parts: AsyncGenerator[Part, None]) -> AdapterExport:
        """The first part, which must be what the bytes that are here belong to."""
        source = self._source
        export = await self._next(parts)
        if export is None:
            raise _BrokenOffError("nothing comes")
        if not isinstance(export, AdapterExport):
            raise _other("what comes has no header")
        if (export.adapter, export.policy_version) != (source.adapter, source.policy_version):
            raise _other(
                "what comes is another version",
                value=f"{export.adapter} version {export.policy_version}",
                allowed=f"{source.adapter} version {source.policy_version}",
            )
        if self._export is None:
            await self._admit(export)
            self._export = export
        elif export != self._export:
            raise _other("what comes is not what began to come")
        return export

    async def _next(self, parts: AsyncGenerator[Part, None]) -> Part | None:
        try:
            async with asyncio.timeout(self._stall_s):
                return await anext(parts, None)
        except TimeoutError:
            raise _BrokenOffError(f"nothing comes for {self._stall_s:g} s") from None
        except (NotFound, DigestMismatch):
            raise
        except InvalidRequest as error:
            if not self._file:
                raise
            # It has less than what is here: another file.
            raise _other(str(error)) from error
        except MeshError as error:
            raise _BrokenOffError(str(error)) from error


def _digest(file: bytearray) -> str:
    try:
        return safetensors_digest(memoryview(file))
    except ValueError as error:
        raise _other(f"what came is not a safetensors file: {error}") from None


def _other(what: str, **context: object) -> DigestMismatch:
    return DigestMismatch(what, field="source.digest", **context)

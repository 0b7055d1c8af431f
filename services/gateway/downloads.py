"""Files of checkpoints, under URLs that are good for a while and need no key.

A URL has a token: what it is for and until when, signed with the project's secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rollmesh.errors import InvalidRequest, NotFound, Unavailable
from rollmesh.types import AdapterExport
from services.gateway.callers import Caller
from services.gateway.encryption import SUFFIX, Encrypted
from services.gateway.listings import iso
from services.gateway.secrets import claims_of, to_base64
from services.gateway.wire.paths import CheckpointPath

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from services.gateway.checkpoints import Checkpoints, Saved
    from services.gateway.documents import Documents, Fields
    from services.gateway.ports import Checkpoints as CheckpointPort
    from services.gateway.secrets import Signer
    from services.gateway.sessions import Sessions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PIECE = 2**20
_BLOCK = 512

Purpose = Literal["files", "archive", "trace"]


@dataclass(frozen=True, slots=True)
class Download:
    """A file as it is sent. `size`: bytes; None: not known before its end."""

    name: str
    size: int | None
    pieces: AsyncIterator[bytes]


class Downloads:
    """Makes URLs, and what is behind them. `clock`: Unix seconds."""

    def __init__(
        self,
        port: CheckpointPort,
        checkpoints: Checkpoints,
        sessions: Sessions,
        documents: Documents,
        signer: Signer,
        clock: Callable[[], float],
        *,
        lifetime_s: float,
    ) -> None:
        self._port = port
        self._checkpoints = checkpoints
        self._sessions = sessions
        self._documents = documents
        self._signer = signer
        self._clock = clock
        self._lifetime_s = lifetime_s

    async def files(self, caller: Caller, path: CheckpointPath, base_url: str) -> Fields:
        """A URL for each file of an exported checkpoint."""
        if path.kind != "external_weights":
            raise InvalidRequest(f"{path}: only external weights are downloaded so", field="path")
        saved = await self._checkpoints.find(caller, path)
        suffix = SUFFIX if saved.entry.get("recipients") else ""
        token, expires = await self._token(caller, "files", str(path))
        return {
            "urls": {
                f"{name}{suffix}": f"{base_url}/api/v1/download/{token}/{name}{suffix}"
                for name in (CONFIG, WEIGHTS)
            },
            "expires": iso(expires),
        }

    async def archive(
        self, caller: Caller, path: CheckpointPath, base_url: str
    ) -> tuple[str, float]:
        """A URL for a tar file of a checkpoint, and until when it is good (Unix seconds)."""
        saved = await self._checkpoints.find(caller, path)
        if saved.entry.get("recipients"):
            raise InvalidRequest(f"{path} is encrypted; it has no archive", field="path")
        token, expires = await self._token(caller, "archive", str(path))
        return f"{base_url}/api/v1/download/{token}/checkpoint.tar", expires

    async def trace(self, caller: Caller, session: str, base_url: str) -> Fields:
        """A URL for what a session made and when, as a trace."""
        await self._sessions.get(caller, session)
        token, _ = await self._token(caller, "trace", session)
        return {"status": "ready", "url": f"{base_url}/api/v1/download/{token}/trace.json"}

    async def open(self, token: str, name: str) -> Download:
        """The file behind a URL. NotFound: it was never one, or is no longer good."""
        gone = NotFound("there is no such download, or it has expired", resource=name)
        text, _, signature = token.partition(".")
        claims = claims_of(text) or {}
        project, purpose, subject, expires = (claims.get(key) for key in ("p", "k", "t", "x"))
        if not (isinstance(project, str) and isinstance(subject, str) and isinstance(expires, int)):
            raise gone
        if not await self._signer.holds(project, f"download {text}", signature):
            raise gone
        if expires < self._clock():
            raise gone
        caller = Caller(project, "")
        if purpose == "trace":
            return await self._trace(caller, subject)
        saved = await self._checkpoints.find(caller, CheckpointPath.parse(subject))
        if purpose == "archive":
            return await self._archive(saved)
        recipients: list[str] = saved.entry.get("recipients") or []
        plain = name.removesuffix(SUFFIX) if recipients else name
        if plain not in {CONFIG, WEIGHTS} or (recipients and not name.endswith(SUFFIX)):
            raise gone
        download = await self._file(saved, plain)
        return _sealed(download, name, recipients) if recipients else download

    async def _token(self, caller: Caller, purpose: Purpose, subject: str) -> tuple[str, float]:
        expires = int(self._clock() + self._lifetime_s)
        claims = {"p": caller.project, "k": purpose, "t": subject, "x": expires}
        text = to_base64(json.dumps(claims, separators=(",", ":")).encode())
        signature = await self._signer.sign(caller.project, f"download {text}")
        return f"{text}.{signature}", expires

    async def _file(self, saved: Saved, name: str) -> Download:
        header, parts = await self._export(saved)
        if name == WEIGHTS:
            return Download(name, header.num_bytes, _weights(header, parts))
        await parts.aclose()
        return _whole(name, header.adapter_config_json.encode())

    async def _archive(self, saved: Saved) -> Download:
        header, parts = await self._export(saved)
        config = header.adapter_config_json.encode()
        first = _member(CONFIG, len(config)) + _padded(config) + _member(WEIGHTS, header.num_bytes)
        filling = -header.num_bytes % _BLOCK
        last = bytes(filling) + _member("checkpoint_complete", 0) + bytes(2 * _BLOCK)

        async def pieces() -> AsyncGenerator[bytes]:
            yield first
            async for piece in _weights(header, parts):
                yield piece
            yield last

        size = len(first) + header.num_bytes + len(last)
        return Download("checkpoint.tar", size, pieces())

    async def _export(
        self, saved: Saved
    ) -> tuple[AdapterExport, AsyncGenerator[AdapterExport | bytes | str]]:
        parts = self._port.export(saved.checkpoint.name)
        header = await anext(parts)
        if not isinstance(header, AdapterExport):
            raise Unavailable(f"the transfer of {saved.path} was torn", resource=saved.path)
        return header, parts

    async def _trace(self, caller: Caller, session: str) -> Download:
        """In the format that Perfetto and Chrome read: https://perfetto.dev/docs."""
        made = [await self._sessions.get(caller, session)]
        for kind in ("runs", "samplers", "checkpoints"):
            made += await self._documents.all(caller.project, f"{kind}/{session}:", most=10_000)
        events: list[dict[str, Any]] = [
            {
                "name": document.key,
                "cat": document.key.partition("/")[0],
                "ph": "i",
                "s": "g",
                "ts": document.create_time * 1e6,
                "pid": 1,
                "tid": 1,
            }
            for document in made
        ]
        return _whole("trace.json", json.dumps({"traceEvents": events}).encode())


async def _weights(
    header: AdapterExport, parts: AsyncGenerator[AdapterExport | bytes | str]
) -> AsyncGenerator[bytes]:
    """The bytes of the weights; Unavailable: they ended too early, or went on."""
    left = header.num_bytes
    complete = False
    async with contextlib.aclosing(parts):
        async for part in parts:
            match part:
                case bytes():
                    left -= len(part)
                    yield part
                case str():
                    complete = True
    if left or not complete:
        raise Unavailable(f"the transfer of {header.adapter} was torn", resource=header.adapter)


def _sealed(download: Download, name: str, recipients: list[str]) -> Download:
    """Encrypted to `recipients`."""

    async def pieces() -> AsyncGenerator[bytes]:
        with Encrypted(recipients) as file:
            async for piece in download.pieces:
                await asyncio.to_thread(file.write, piece)
            await asyncio.to_thread(file.seal)
            for piece in file.pieces(_PIECE):
                yield piece

    return Download(name, None, pieces())


def _whole(name: str, data: bytes) -> Download:
    async def pieces() -> AsyncGenerator[bytes]:
        yield data

    return Download(name, len(data), pieces())


def _member(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _BLOCK)

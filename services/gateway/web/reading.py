"""What a request brings: its body, decompressed and no larger than it may be, and its query."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import zstandard

from rollmesh.errors import InvalidRequest, MeshError
from services.gateway.wire.bodies import parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from services.gateway.wire.bodies import BodyT

HEAD = 4096
"""Bytes that are kept of a body that is too large."""
_MAX_WINDOW = 2**27
_DRAINED = 4
"""A body so many times too large is read to its end, so that its sender hears the answer."""


class TooLarge(MeshError):
    """A body is larger than it may be. `head`: how it begins, decompressed."""

    status, reason = "TOO_LARGE", "TOO_LARGE"
    head = b""


async def body(request: Request, max_bytes: int) -> bytes:
    """The body.

    Raises:
        TooLarge: it is, compressed or not.
        InvalidRequest: it cannot be decompressed.
    """
    decode = _decoder(request.headers.get("content-encoding", ""))
    sent = bytearray()
    received = 0
    async for piece in request.stream():
        received += len(piece)
        sent += piece[: max_bytes + 1 - len(sent)]
        if received > _DRAINED * max_bytes:
            break
    whole = decode(bytes(sent), max_bytes + 1)
    if len(sent) > max_bytes or len(whole) > max_bytes:
        error = TooLarge(
            f"the body is larger than {max_bytes} bytes", field="body", allowed=max_bytes
        )
        error.head = whole[:HEAD]
        raise error
    return whole


async def json_of(request: Request, model: type[BodyT], max_bytes: int) -> BodyT:
    """The body as JSON of this form."""
    return parse(model, await body(request, max_bytes))


def _plain(sent: bytes, most: int) -> bytes:
    return sent[:most]


def _zlib(sent: bytes, most: int) -> bytes:
    try:
        # gzip or zlib, by what it begins with.
        return zlib.decompressobj(47).decompress(sent, most)
    except zlib.error:
        raise _broken() from None


def _zstd(sent: bytes, most: int) -> bytes:
    # By a reader: the other ways make all that a few bytes say before they look at its size.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    try:
        with decompressor.stream_reader(sent) as reader:
            return reader.read(most)
    except zstandard.ZstdError:
        raise _broken() from None


def _decoder(encoding: str) -> Callable[[bytes, int], bytes]:
    match encoding.strip().lower():
        case "" | "identity":
            return _plain
        case "zstd":
            return _zstd
        case "gzip" | "deflate":
            return _zlib
    raise InvalidRequest(
        f"Content-Encoding: {encoding[:50]!r} is not one of zstd, gzip, deflate, identity",
        field="Content-Encoding",
        allowed="zstd, gzip, deflate, identity",
    )


def _broken() -> InvalidRequest:
    return InvalidRequest("body: it is not what its Content-Encoding says", field="body")


def number(request: Request, name: str, default: int, *, least: int, most: int) -> int:
    """A number in the query.

    Raises:
        InvalidRequest: it is none, or out of range.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18 or not least <= int(text) <= most:
        raise InvalidRequest(
            f"{name}: {text[:50]!r} is not in [{least}, {most}]",
            field=name,
            value=text[:50],
            allowed=f"[{least}, {most}]",
        )
    return int(text)

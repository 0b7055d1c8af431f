"""What a request brings: its body, decompressed and no larger than it may be, and its query."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING

import zstandard

from rollmesh.errors import InvalidRequest, MeshError, Overloaded
from services.gateway.aside import aside
from services.gateway.wire.bodies import parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from services.gateway.web.holding import Held
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


async def body(request: Request, max_bytes: int, held: Held | None = None) -> bytes:
    """The body. `held`: takes account of its bytes; None: they are too few to count.

    Raises:
        TooLarge: it is, compressed or not.
        InvalidRequest: it cannot be decompressed.
        Overloaded: too many bytes are held already.
    """
    decode = _decoder(request.headers.get("content-encoding", ""))
    sent = await _sent(request, max_bytes, held)
    whole = sent
    if decode is not None:
        # In a thread however small it is: a few bytes may say a lot.
        whole = await asyncio.to_thread(decode, sent, max_bytes + 1)
        if held:
            held.take(len(whole))
    if len(sent) > max_bytes or len(whole) > max_bytes:
        too_large = TooLarge(
            f"the body is larger than {max_bytes} bytes", field="body", allowed=max_bytes
        )
        too_large.head = whole[:HEAD]
        raise too_large
    return whole


async def _sent(request: Request, max_bytes: int, held: Held | None) -> bytes:
    """The body as it came, or one byte too much of it.

    It is read to its end also where it is not kept, so that its sender hears the answer.
    """
    sent = bytearray()
    received = 0
    refused: Overloaded | None = None
    async for piece in request.stream():
        received += len(piece)
        kept = piece[: max_bytes + 1 - len(sent)]
        if held and not refused:
            try:
                held.take(len(kept))
            except Overloaded as error:
                refused = error
                sent.clear()
                held.drop()
        if not refused:
            sent += kept
        if received > _DRAINED * max_bytes:
            break
    if refused:
        raise refused
    return bytes(sent)


async def json_of(
    request: Request, model: type[BodyT], max_bytes: int, held: Held | None = None
) -> BodyT:
    """The body as JSON of this form."""
    whole = await body(request, max_bytes, held)
    return await aside(len(whole), parse, model, whole)


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


def _decoder(encoding: str) -> Callable[[bytes, int], bytes] | None:
    match encoding.strip().lower():
        case "" | "identity":
            return None
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

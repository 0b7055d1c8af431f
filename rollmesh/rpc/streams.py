"""Messages on calls that are streamed both ways, whose other side may end them at any time."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined] # its stubs know it not

if TYPE_CHECKING:
    from google.protobuf.message import Message


async def send(call: grpc.aio.StreamStreamCall[Any, Any], request: Message) -> None:
    """Write `request`; where the call has ended nothing is raised, and `receive` tells why.

    One at a time. As `call.write`, which puts an error of its own in the place of the status that
    the server has ended the call with, where that is on its way: nobody would ever see it.
    """
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call.wait_for_connection()
    if call.done():
        return
    core = cast("Any", call)._cython_call  # noqa: SLF001 - there is no other way
    try:
        await core.send_serialized_message(request.SerializeToString())
    except cygrpc.InternalError:
        return
    except asyncio.CancelledError:
        call.cancel()
        raise


async def receive(call: grpc.aio.StreamStreamCall[Any, Any]) -> Any:
    """The next response; None: the server has ended the call well.

    Raises:
        AioRpcError: what it has ended the call with.
    """
    response = await call.read()
    if response is not grpc.aio.EOF:
        return response
    # Its status, where it is not OK, is raised by nothing but this.
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            code,
            await call.initial_metadata(),
            await call.trailing_metadata(),
            details=await call.details(),
        )
    return None

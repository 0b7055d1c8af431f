"""What is wrapped around every call.

Server side: a MeshError that leaves a handler becomes a status; anything else is a bug.
Client side: a caller that is cancelled cancels its call.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from typing import TYPE_CHECKING, Any

import grpc

from rollmesh.errors import InternalError, MeshError
from rollmesh.rpc.status import to_status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into google.rpc.Status, whatever of the RPC is streamed."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of the call, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:  # An unknown method: grpc says so itself.
            return None
        method = handler_call_details.method
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _unary(handler.unary_unary, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _stream(handler.stream_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return handler


def _unary(handler: Any, method: str) -> Any:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await handler(request, context)
        except MeshError as error:
            await context.abort_with_status(to_status(error))
        except Exception as error:
            # `abort` raises AbortError, an Exception, on purpose: let it through.
            if isinstance(error, grpc.aio.AbortError):
                raise
            await context.abort_with_status(to_status(_bug(method, error)))

    return call


def _stream(handler: Any, method: str) -> Any:
    async def call(request: Any, context: Context) -> AsyncGenerator[Any]:
        try:
            answer = handler(request, context)
            if inspect.isawaitable(answer):
                # A handler in gRPC's other style, as health's and episodes': it writes by itself.
                await answer
                return
            # A call that is cancelled while it writes must end there at once too.
            async with contextlib.aclosing(answer):
                async for response in answer:
                    yield response
        except MeshError as error:
            await context.abort_with_status(to_status(error))
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError):
                raise
            await context.abort_with_status(to_status(_bug(method, error)))

    return call


def _bug(method: str, error: Exception) -> InternalError:
    log.error("bug in %s", method, exc_info=error)
    return InternalError("internal error; the server's log has the traceback", method=method)


class CancelWithCaller(grpc.aio.UnaryUnaryClientInterceptor):
    """Cancels a unary call when its caller is cancelled; the innermost interceptor.

    OpenTelemetry's interceptor awaits the call's status, and cancelling that does not cancel the
    call: the server would work on for nobody. Awaiting the call itself does.
    """

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        """The call, once it is over."""
        call = await continuation(client_call_details, request)
        with contextlib.suppress(grpc.aio.AioRpcError):  # Whoever awaits the call will see it.
            await call
        return call

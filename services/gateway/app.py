"""The gateway as an ASGI application."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from rollmesh.errors import MeshError
from rollmesh.telemetry import log_fields, record, span
from services.gateway.auth import Unauthenticated
from services.gateway.web.answering import failure, problem, respond
from services.gateway.web.endpoints import ENDPOINTS, Call
from services.gateway.web.holding import Holding

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from starlette.requests import Request
    from starlette.responses import Response

    from services.gateway.callers import Caller
    from services.gateway.gateway import Gateway
    from services.gateway.web.endpoints import Reply
    from services.gateway.web.holding import Held

PREFIX = "/api/v1/"

log = logging.getLogger(__name__)


def app(gateway: Gateway, others: Iterable[Route] = ()) -> Starlette:
    """Its endpoints over HTTP, and `others`."""
    holding = Holding(gateway.config.max_held_bytes)
    routes = [
        Route(PREFIX + path, partial(_answer, gateway, holding, path, endpoint), methods=[method])
        for (method, path), endpoint in ENDPOINTS.items()
    ]
    application = Starlette(
        routes=[*routes, *others], exception_handlers={HTTPException: _no_such_path}
    )
    # A path with a slash more is another path: it is not there, and nobody is sent elsewhere.
    application.router.redirect_slashes = False
    return application


async def _answer(
    gateway: Gateway,
    holding: Holding,
    path: str,
    endpoint: Callable[[Call], Awaitable[Reply]],
    request: Request,
) -> Response:
    """Of one request, whatever comes of it."""
    begun = time.perf_counter()
    with (
        span("gateway.request", endpoint=path, method=request.method) as current,
        holding.request() as held,
    ):
        call = Call(gateway, request, partial(_caller, gateway, request, held), held)
        try:
            with log_fields(endpoint=path):
                response = await respond(request, await endpoint(call))
        except MeshError as error:
            response = failure(error)
            if response.status_code == 500:
                log.exception("%s failed", path)
        except ClientDisconnect:
            response = problem(400, "the body did not come to its end")
        except Exception:
            log.exception("bug in %s", path)
            response = bug(path)
        current.set_attribute("http.response.status_code", response.status_code)
    record(
        "rollmesh.gateway.request",
        time.perf_counter() - begun,
        endpoint=path,
        status=response.status_code,
    )
    return response


def bug(path: str) -> Response:
    """What is said of our own mistakes.

    In a poll it is final: after a 500 the SDK would poll again at once, for ever.
    """
    said = "internal error; the gateway's log has the traceback"
    if path == "retrieve_future":
        return problem(200, said, error=said, category="server")
    return problem(500, said)


async def _caller(gateway: Gateway, request: Request, held: Held) -> Caller:
    shown = request.headers.get("x-api-key", "")
    if not shown:
        raise Unauthenticated("X-API-Key: an API key is needed, tml-…")
    caller = await gateway.auth.caller(shown)
    held.project = caller.project
    return caller


async def _no_such_path(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return problem(status, f"there is no {request.method} {request.url.path[:200]}")

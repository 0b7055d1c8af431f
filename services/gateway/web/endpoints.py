"""Which path is which core's. Each endpoint reads, makes one call, and answers."""

from __future__ import annotations

import contextlib
import email.utils
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import RedirectResponse, StreamingResponse

from rollmesh.errors import InvalidRequest, NotFound
from services.gateway.web.answering import problem
from services.gateway.web.reading import TooLarge, body, json_of, number
from services.gateway.wire import bodies
from services.gateway.wire.ids import ModelId
from services.gateway.wire.paths import CheckpointPath
from services.gateway.wire.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from services.gateway.answers import Answer
    from services.gateway.callers import Caller
    from services.gateway.gateway import Gateway
    from services.gateway.web.holding import Held
    from services.gateway.wire.bodies import BodyT

    Reply = dict[str, Any] | Answer | Response | None

_MAX_TELEMETRY_BYTES = 2**20
_MAX_RETRIEVE_BYTES = 2**16
_MAX_SMALL_BYTES = 2**20
"""Of all that is neither a batch nor a prompt."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `who`: finds out who asks, which may raise; `held`: the bytes of its body."""

    gateway: Gateway
    request: Request
    who: Callable[[], Awaitable[Caller]]
    held: Held

    @property
    def max_small_bytes(self) -> int:
        """The largest body of most endpoints."""
        return min(_MAX_SMALL_BYTES, self.gateway.config.max_body_bytes)

    async def raw(self) -> bytes:
        """Its body, which is small."""
        return await body(self.request, self.max_small_bytes, self.held)

    async def json(self, model: type[BodyT]) -> BodyT:
        """Its body, which is small, as JSON of this form."""
        return await json_of(self.request, model, self.max_small_bytes, self.held)

    def part(self, name: str) -> str:
        """A part of its path."""
        return str(self.request.path_params[name])

    def page(self, default: int) -> dict[str, int]:
        """Which page it asks for."""
        return {
            "limit": number(self.request, "limit", default, least=0, most=1000),
            "offset": number(self.request, "offset", 0, least=0, most=10**9),
        }

    @property
    def checkpoint(self) -> CheckpointPath:
        """The checkpoint that its path names."""
        model = ModelId.parse(self.part("run"), field="training_run_id")
        return CheckpointPath.of(model, self.part("kind"), self.part("name"))

    @property
    def base_url(self) -> str:
        """Where this gateway is reached."""
        return (self.gateway.config.public_url or str(self.request.base_url)).rstrip("/")


async def healthz(_: Call) -> Reply:
    return {"status": "ok"}


async def client_config(call: Call) -> Reply:
    await call.who()
    config = call.gateway.config
    return {**config.client.model_dump(), "pjwt_auth_enabled": config.tokens}


async def dynamic_config(call: Call) -> Reply:
    await call.who()
    return {"sample_cancel_enabled": True}


async def token(call: Call) -> Reply:
    return {"jwt": await call.gateway.auth.token(await call.who())}


async def telemetry(call: Call) -> Reply:
    # It is dropped either way.
    with contextlib.suppress(InvalidRequest, TooLarge):
        await body(call.request, _MAX_TELEMETRY_BYTES)
    return {"status": "accepted"}


async def capabilities(call: Call) -> Reply:
    await call.who()
    return await call.gateway.capabilities.tell()


async def create_session(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.sessions.create(caller, await call.json(bodies.CreateSession))


async def heartbeat(call: Call) -> Reply:
    caller = await call.who()
    try:
        asked = await call.json(bodies.OfSession)
        await call.gateway.sessions.heartbeat(caller, asked.session_id)
    except NotFound as error:
        return problem(410, str(error))  # upon which the SDK stops
    return {"type": "session_heartbeat"}


async def finish(call: Call) -> None:
    caller = await call.who()
    asked = await call.json(bodies.Finish)
    await call.gateway.sessions.finish(caller, call.part("session"), asked)


async def sessions(call: Call) -> Reply:
    return await call.gateway.sessions.list(await call.who(), **call.page(20))


async def session(call: Call) -> Reply:
    return await call.gateway.sessions.tell(await call.who(), call.part("session"))


async def assign(call: Call) -> None:
    caller = await call.who()
    asked = await call.json(bodies.OfProject)
    await call.gateway.sessions.assign(caller, call.part("session"), asked.project_id)


async def trace_export(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.downloads.trace(caller, call.part("session"), call.base_url)


async def search_sessions(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.search.sessions(caller, await call.json(bodies.SearchSessions))


async def create_model(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.models.create(caller, await call.json(bodies.CreateModel))


async def get_info(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.models.info(caller, await call.json(bodies.OfModel))


async def load_weights(call: Call) -> Reply:
    caller = await call.who()
    raw = await call.raw()
    place = bodies.parse(bodies.PlaceOfLoad, raw)
    if place.model_id is not None:
        return await call.gateway.training.load(caller, raw)
    return await call.gateway.models.load(caller, bodies.parse(bodies.LoadWeights, raw))


async def forward_backward(call: Call) -> Reply:
    caller = await call.who()
    training = call.gateway.training
    try:
        batch = await body(call.request, call.gateway.config.max_body_bytes, call.held)
        return await training.forward_backward(caller, batch)
    except TooLarge as error:
        return await training.refuse(caller, error.head, error)


async def optim_step(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.training.optim_step(caller, await call.raw())


async def save_weights(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.checkpoints.save(caller, await call.raw())


async def save_weights_for_sampler(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.checkpoints.save_for_sampler(caller, await call.raw())


async def save_weights_external(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.checkpoints.save_external(caller, await call.raw())


async def create_custom_loss(call: Call) -> Reply:
    await call.who()
    raise InvalidRequest(
        "custom losses are computed by the client here: custom_loss_server_side is off"
    )


async def create_sampling_session(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.sampling.create(caller, await call.json(bodies.CreateSampler))


async def join_sampling_session(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.sampling.join(caller, await call.json(bodies.OfSampler))


async def sampler(call: Call) -> Reply:
    return await call.gateway.sampling.info(await call.who(), call.part("sampler"))


async def asample(call: Call) -> Reply:
    caller = await call.who()
    most = call.gateway.config.max_body_bytes
    asked = await json_of(call.request, Sample, most, call.held)
    return await call.gateway.sampling.sample(caller, asked)


async def retrieve_future(call: Call) -> Reply:
    # It is read before it is known who asks.
    asked = await json_of(call.request, bodies.Retrieve, _MAX_RETRIEVE_BYTES)
    return await call.gateway.results.retrieve(call.who, asked)


async def retrieve_futures(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.results.retrieve_many(caller, await call.json(bodies.RetrieveMany))


async def cancel_future(call: Call) -> Reply:
    caller = await call.who()
    await call.gateway.results.cancel(caller, await call.json(bodies.Retrieve))
    return {}


async def weights_info(call: Call) -> Reply:
    caller = await call.who()
    asked = await call.json(bodies.OfPath)
    path = CheckpointPath.parse(asked.tinker_path, field="tinker_path")
    return await call.gateway.listings.weights_info(caller, path)


async def copy_weights(call: Call) -> Reply:
    caller = await call.who()
    request_id = call.request.headers.get("x-idempotency-key", "")
    return await call.gateway.copies.copy(caller, await call.json(bodies.CopyWeights), request_id)


async def training_runs(call: Call) -> Reply:
    caller = await call.who()
    project = call.request.query_params.get("project_id")
    return await call.gateway.listings.runs(caller, project=project, **call.page(20))


async def training_run(call: Call) -> Reply:
    return await call.gateway.listings.run(await call.who(), call.part("run"))


async def run_checkpoints(call: Call) -> Reply:
    return await call.gateway.listings.of_run(await call.who(), call.part("run"))


async def checkpoints(call: Call) -> Reply:
    return await call.gateway.listings.checkpoints(await call.who(), **call.page(100))


async def delete_checkpoint(call: Call) -> None:
    await call.gateway.checkpoints.delete(await call.who(), call.checkpoint)


async def publish(call: Call) -> None:
    await call.gateway.checkpoints.set_public(await call.who(), call.checkpoint, public=True)


async def unpublish(call: Call) -> None:
    await call.gateway.checkpoints.set_public(await call.who(), call.checkpoint, public=False)


async def set_ttl(call: Call) -> None:
    caller = await call.who()
    asked = await call.json(bodies.SetTtl)
    await call.gateway.copies.set_ttl(caller, call.checkpoint, asked.ttl_seconds)


async def external_weights_urls(call: Call) -> Reply:
    caller = await call.who()
    return await call.gateway.downloads.files(caller, call.checkpoint, call.base_url)


async def archive(call: Call) -> Reply:
    caller = await call.who()
    url, expires = await call.gateway.downloads.archive(caller, call.checkpoint, call.base_url)
    headers = {"Expires": email.utils.formatdate(expires, usegmt=True)}
    return RedirectResponse(url, 302, headers)


async def download(call: Call) -> Reply:
    file = await call.gateway.downloads.open(call.part("token"), call.part("name"))
    headers = {"content-disposition": f'attachment; filename="{file.name}"'}
    if file.size is not None:
        headers["content-length"] = str(file.size)
    return StreamingResponse(file.pieces, 200, headers, "application/octet-stream")


async def audit(call: Call) -> Reply:
    caller = await call.who()
    query = call.request.query_params
    return await call.gateway.account.audit(
        caller, query.get("event_type", "all"), query.get("day")
    )


async def usage_events(call: Call) -> Reply:
    await call.who()
    return call.gateway.account.usage()


async def usage_checkpoints(call: Call) -> Reply:
    return await call.gateway.account.storage(await call.who())


async def api_key(call: Call) -> Reply:
    return call.gateway.account.key(await call.who())


async def delete_api_key(call: Call) -> None:
    await call.gateway.auth.forget(await call.who())


_RUN = "training_runs/{run}"
_CHECKPOINT = f"{_RUN}/checkpoints/{{kind}}/{{name}}"

ENDPOINTS: dict[tuple[str, str], Callable[[Call], Awaitable[Reply]]] = {
    ("GET", "healthz"): healthz,
    ("POST", "client/config"): client_config,
    ("POST", "client/dynamic_config"): dynamic_config,
    ("POST", "auth/token"): token,
    ("GET", "auth/apikey/me"): api_key,
    ("DELETE", "auth/apikey/me"): delete_api_key,
    ("POST", "telemetry"): telemetry,
    ("GET", "get_server_capabilities"): capabilities,
    ("POST", "create_session"): create_session,
    ("POST", "session_heartbeat"): heartbeat,
    ("GET", "sessions"): sessions,
    ("POST", "sessions/search"): search_sessions,
    ("GET", "sessions/{session}"): session,
    ("POST", "sessions/{session}/finish"): finish,
    ("PUT", "sessions/{session}/project"): assign,
    ("GET", "sessions/{session}/trace_export"): trace_export,
    ("POST", "create_model"): create_model,
    ("POST", "get_info"): get_info,
    ("POST", "load_weights"): load_weights,
    ("POST", "forward_backward"): forward_backward,
    ("POST", "optim_step"): optim_step,
    ("POST", "save_weights"): save_weights,
    ("POST", "save_weights_for_sampler"): save_weights_for_sampler,
    ("POST", "save_weights_external"): save_weights_external,
    ("POST", "create_custom_loss"): create_custom_loss,
    ("POST", "create_sampling_session"): create_sampling_session,
    ("POST", "join_sampling_session"): join_sampling_session,
    ("GET", "samplers/{sampler}"): sampler,
    ("POST", "asample"): asample,
    ("POST", "retrieve_future"): retrieve_future,
    ("POST", "retrieve_futures"): retrieve_futures,
    ("POST", "cancel_future"): cancel_future,
    ("POST", "weights_info"): weights_info,
    ("POST", "copy_weights"): copy_weights,
    ("GET", "training_runs"): training_runs,
    ("GET", _RUN): training_run,
    ("GET", f"{_RUN}/checkpoints"): run_checkpoints,
    ("GET", "checkpoints"): checkpoints,
    ("DELETE", _CHECKPOINT): delete_checkpoint,
    ("POST", f"{_CHECKPOINT}/publish"): publish,
    ("DELETE", f"{_CHECKPOINT}/publish"): unpublish,
    ("PUT", f"{_CHECKPOINT}/ttl"): set_ttl,
    ("GET", f"{_CHECKPOINT}/external_weights_urls"): external_weights_urls,
    ("GET", f"{_CHECKPOINT}/archive"): archive,
    ("GET", "download/{token}/{name}"): download,
    ("GET", "audit"): audit,
    ("GET", "billing/usage/events"): usage_events,
    ("GET", "billing/usage/checkpoints/current"): usage_checkpoints,
}
"""By method and path, below /api/v1/."""

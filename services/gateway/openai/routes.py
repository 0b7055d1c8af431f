"""The endpoints: `routes` makes them, for the gateway's app to mount."""

from __future__ import annotations

import logging
import time
import uuid
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rollmesh.errors import MeshError
from services.gateway.openai.answers import ChatAnswer, CompletionAnswer, Heading
from services.gateway.openai.chat_body import ChatBody
from services.gateway.openai.completion_body import CompletionBody
from services.gateway.openai.drawing import ClientGone
from services.gateway.openai.failures import UNAUTHORIZED, Refusal, refusal_of
from services.gateway.openai.logprobs import Spelling
from services.gateway.openai.models import Models
from services.gateway.openai.params import params_of
from services.gateway.openai.replies import EventStream, Job, whole
from services.gateway.openai.request import check_count, choices_of, read_body
from services.gateway.openai.tokenizers import Tokenizers, chat_prompt, completion_prompts
from services.gateway.openai.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from starlette.requests import Request

    from rollmesh.client import Client
    from rollmesh.tokenizer import ModelTokenizer
    from services.gateway.openai.answers import Answer
    from services.gateway.openai.bodies import Drawing
    from services.gateway.openai.config import OpenAiConfig
    from services.gateway.openai.models import Found
    from services.gateway.openai.ports import CheckpointPolicy, ProjectOf, Records

log = logging.getLogger(__name__)

_CHAT = {"prompt_token_ids": "messages"}
_COMPLETION = {"prompt_token_ids": "prompt", "params.top_logprobs": "logprobs"}
_CLIENT_GONE = 499
"""Nobody sees it but a log."""
_BUG = Refusal(500, "internal error; the gateway's log has the traceback", code="internal_error")


def routes(
    config: OpenAiConfig,
    client: Client,
    *,
    records: Records,
    project_of: ProjectOf,
    policy_of: CheckpointPolicy,
    load_tokenizer: Callable[[str], ModelTokenizer],
    clock: Callable[[], float] = time.time,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
) -> list[Route]:
    """The routes below /v1.

    Args:
        config: bounds.
        client: of the coordinator.
        records: where turns are kept; of the coordinator too.
        project_of: whose a request is.
        policy_of: what Tinker's paths mean.
        load_tokenizer: by the name of a base model; it blocks, and is asked once for each.
        clock: Unix seconds.
        new_id: 32 hexadecimal digits that never come again.
    """
    endpoints = _Endpoints(
        config, client, records, policy_of, load_tokenizer, clock=clock, new_id=new_id
    )

    def guarded(
        endpoint: Callable[[Request, str], Awaitable[Response]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                project = await project_of(request)
                if project is None:
                    return UNAUTHORIZED.response
                return await endpoint(request, project)
            except Refusal as refusal:
                return refusal.response
            except (ClientGone, ClientDisconnect):
                return Response(status_code=_CLIENT_GONE)
            except MeshError as error:
                return refusal_of(error, {}).response
            except Exception:
                log.exception("bug in %s", request.url.path)
                return _BUG.response

        return answer

    return [
        Route("/v1/models", guarded(endpoints.models), methods=["GET"]),
        Route("/v1/models/{id:path}", guarded(endpoints.model), methods=["GET"]),
        Route("/v1/completions", guarded(endpoints.completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(endpoints.chat), methods=["POST"]),
        Route("/v1/turns/{id}", guarded(endpoints.turn), methods=["GET"]),
    ]


class _Endpoints:
    def __init__(
        self,
        config: OpenAiConfig,
        client: Client,
        records: Records,
        policy_of: CheckpointPolicy,
        load_tokenizer: Callable[[str], ModelTokenizer],
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._config = config
        self._sampling = client.sampling
        self._models = Models(
            client.fleet, client.adapters, policy_of, max_listed=config.max_models
        )
        self._tokenizers = Tokenizers(load_tokenizer)
        self._turns = Turns(
            records,
            ttl_s=config.turn_retention_s if config.keep_turns else None,
            max_bytes=config.max_turn_bytes,
        )
        self._clock = clock
        self._new_id = new_id

    async def models(self, request: Request, project: str) -> Response:  # noqa: ARG002
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": await self._models.listed(project)})

    async def model(self, request: Request, project: str) -> Response:
        """GET /v1/models/{id}."""
        found = await self._models.find(project, request.path_params["id"])
        return JSONResponse(found.to_json())

    async def turn(self, request: Request, project: str) -> Response:
        """GET /v1/turns/{id}."""
        try:
            return JSONResponse(await self._turns.get(project, request.path_params["id"]))
        except MeshError as error:
            refusal = refusal_of(error, {})
            if refusal.status == 404:
                refusal.code = "turn_not_found"
            raise refusal from None

    async def completions(self, request: Request, project: str) -> Response:
        """POST /v1/completions."""
        body = await read_body(request, CompletionBody, max_bytes=self._config.max_body_bytes)
        self._check_choices(body.n * len(body.prompt))
        found = await self._models.find(project, body.model)
        tokenizer = await self._tokenizers.of(found.base_model)
        prompts = await completion_prompts(body, tokenizer)
        heading = self._heading("cmpl", found, body, tokenizer, body.logprobs is not None)
        return await self._answer(
            request,
            project,
            found,
            body,
            prompts,
            tokenizer,
            CompletionAnswer(heading),
            _COMPLETION,
        )

    async def chat(self, request: Request, project: str) -> Response:
        """POST /v1/chat/completions."""
        body = await read_body(request, ChatBody, max_bytes=self._config.max_body_bytes)
        check_count(len(body.messages), self._config.max_messages, field="messages")
        check_count(len(body.tools), self._config.max_tools, field="tools")
        self._check_choices(body.n)
        found = await self._models.find(project, body.model)
        tokenizer = await self._tokenizers.of(found.base_model)
        prompt = await chat_prompt(body, tokenizer)
        heading = self._heading("chatcmpl", found, body, tokenizer, body.logprobs)
        return await self._answer(
            request, project, found, body, [prompt], tokenizer, ChatAnswer(heading), _CHAT
        )

    def _check_choices(self, count: int) -> None:
        check_count(count, self._config.max_choices, field="n")

    def _heading(
        self,
        kind: str,
        found: Found,
        body: Drawing,
        tokenizer: ModelTokenizer,
        with_logprobs: bool,  # noqa: FBT001 - private
    ) -> Heading:
        return Heading(
            id=f"{kind}-{self._new_id()}",
            model=found.id,
            created=int(self._clock()),
            with_logprobs=with_logprobs,
            with_token_ids=body.return_token_ids,
            spelling=Spelling(tokenizer, as_ids=body.return_tokens_as_token_ids),
        )

    async def _answer(
        self,
        request: Request,
        project: str,
        found: Found,
        body: Drawing,
        prompts: Sequence[tuple[int, ...]],
        tokenizer: ModelTokenizer,
        answer: Answer,
        fields: Mapping[str, str],
    ) -> Response:
        job = Job(
            sampling=self._sampling,
            turns=self._turns,
            project=project,
            policy=found.policy,
            params=params_of(body),
            num_completions=body.n,
            choices=choices_of(body, prompts, tokenizer, answer.heading.id),
            answer=answer,
            fields=fields,
        )
        if body.stream:
            return EventStream(job, with_usage=body.stream_options.include_usage)
        try:
            return await whole(job, request.receive)
        except MeshError as error:
            raise refusal_of(error, job.fields) from None

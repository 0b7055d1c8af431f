"""A body, read within its bound and checked, and the choices that it is to come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from rollmesh.chat_template import CALL_BEGINS, CALL_ENDS
from rollmesh.config import explain
from rollmesh.errors import InvalidRequest
from services.gateway.openai.bodies import Drawing
from services.gateway.openai.calls import CallReader, PlainReader, RequiredCallReader
from services.gateway.openai.chat_body import ChatBody
from services.gateway.openai.choice import Choice
from services.gateway.openai.failures import Refusal
from services.gateway.openai.text import StopCutter, TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request

    from rollmesh.tokenizer import ModelTokenizer
    from services.gateway.openai.calls import Reader

BodyT = TypeVar("BodyT", bound=Drawing)

_MANY_CALLS = 2**31
"""More than any completion has."""


async def read_body(request: Request, model: type[BodyT], *, max_bytes: int) -> BodyT:
    """The body of `request`.

    Raises:
        Refusal: it is too large.
        InvalidRequest: it is not JSON, or not `model`; the message names each key.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise Refusal(413, f"the body has more than {max_bytes} bytes", code="body_too_large")
    try:
        values = from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", value="") from None
    if not isinstance(values, dict):
        raise InvalidRequest("the body is not a JSON object", value="")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, source="the body") from None


def check_count(count: int, most: int, *, field: str) -> None:
    """Refuse more than `most` of what `field` has."""
    if count > most:
        raise InvalidRequest(
            f"{field}: {count} of them, allowed are at most {most}",
            field=field,
            value=count,
            allowed=f"at most {most}",
        )


def choices_of(
    body: Drawing,
    prompts: Sequence[tuple[int, ...]],
    tokenizer: ModelTokenizer,
    answer_id: str,
) -> list[Choice]:
    """The completions that `body` asks for, empty yet: `n` for each prompt."""
    chat = body if isinstance(body, ChatBody) else None
    reads_calls = bool(chat and chat.offered)
    shown = {CALL_BEGINS, CALL_ENDS} if reads_calls else set()
    hidden = {
        token_id
        for token_id, text in tokenizer.special.items()
        if body.skip_special_tokens and text not in shown
    }
    unique = answer_id.rpartition("-")[2]

    def reader(index: int) -> Reader:
        if chat and chat.required:
            return RequiredCallReader(f"call_{unique}_{index}_0")
        if reads_calls:
            return CallReader(lambda number: f"call_{unique}_{index}_{number}")
        return PlainReader()

    return [
        Choice(
            index=index,
            prompt_token_ids=prompts[index // body.n],
            stream=TextStream(tokenizer, hidden),
            cutter=StopCutter(body.stop, keep=body.include_stop_str_in_output),
            reader=reader(index),
            max_calls=_MANY_CALLS if not chat or chat.parallel_tool_calls else 1,
            # Of a function that was named OpenAI says "stop".
            calls_end_it=not (chat and chat.tool_choice.startswith("=")),
        )
        for index in range(len(prompts) * body.n)
    ]

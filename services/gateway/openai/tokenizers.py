"""The tokenizers of the base models that were asked for, each loaded once, beside the loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh.tokenizer import ModelTokenizer
    from services.gateway.openai.chat_body import ChatBody
    from services.gateway.openai.completion_body import CompletionBody


class Tokenizers:
    """Text to tokens, in threads: a long chat takes a while. Bounded by the fleet's base models."""

    def __init__(self, load: Callable[[str], ModelTokenizer]) -> None:
        """`load`: by the name of a base model; it blocks."""
        self._load = load
        self._loaded: dict[str, ModelTokenizer] = {}

    async def of(self, base_model: str) -> ModelTokenizer:
        """The tokenizer of a base model of the mesh: nobody else's word is loaded."""
        if base_model not in self._loaded:
            self._loaded[base_model] = await asyncio.to_thread(self._load, base_model)
        return self._loaded[base_model]


async def chat_prompt(body: ChatBody, tokenizer: ModelTokenizer) -> tuple[int, ...]:
    """The chat as the model's template writes it.

    Raises:
        InvalidRequest: it has tools or messages that the template does not take.
    """
    if body.offered and not tokenizer.has_tools:
        raise InvalidRequest(
            "tools: the chat template of this model knows no tools",
            field="tools",
            value=f"{len(body.tools)} tools",
            allowed="none",
        )
    messages = [message.for_template() for message in body.messages]
    tools = [tool.for_template() for tool in body.offered] or None
    return tuple(await asyncio.to_thread(tokenizer.render, messages, tools))


async def completion_prompts(
    body: CompletionBody, tokenizer: ModelTokenizer
) -> list[tuple[int, ...]]:
    """Each prompt's tokens; those that are tokens stay as they are.

    Raises:
        InvalidRequest: a text has no tokens.
    """

    def encoded() -> list[tuple[int, ...]]:
        return [
            tuple(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
            for prompt in body.prompt
        ]

    prompts = await asyncio.to_thread(encoded)
    if not all(prompts):
        raise InvalidRequest(
            "prompt: a text without tokens", field="prompt", value="", allowed="a token at least"
        )
    return prompts

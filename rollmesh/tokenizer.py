"""Text to token ids and back, as the base model's own files say, without transformers.

Equal to what transformers.AutoTokenizer does with the same files: tokenizer.json,
tokenizer_config.json and the chat template, which is in chat_template.jinja or in that config.
Which tokens go around a plain text tokenizer.json alone decides: like transformers, this ignores
add_bos_token and add_eos_token in the config.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2 import Template
    from jinja2.parser import Parser

_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


_TOOLS = re.compile(r"\btool(?:s|_calls)\b")
_TURN = "what-was-said"
"""Stands for a turn whose text does not matter. Only the first place where it comes up is looked
at, and that is before anything that an environment says."""


class ModelTokenizer:
    """The tokenizer of one base model. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template | None,
        named: dict[str, str],
        *,
        has_tools: bool = False,
    ) -> None:
        """`template` renders chats; `named` are the special tokens by name, for the template.

        `has_tools`: it tells the model of tools, or writes calls of them.
        """
        self.has_tools = has_tools
        self._tokenizer = tokenizer
        self._template = template
        self._named = named
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token_id: token.content for token_id, token in added if token.special}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """A chat with its generation prompt, by the model's chat template.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses these messages.
        """
        # The template has put the special tokens where they belong.
        return self._ids(self._rendered(messages, tools, add_generation_prompt=True))

    def follow(
        self,
        observation: Sequence[Mapping[str, Any]],
        last_token: int | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """What comes after an assistant's turn that was drawn, up to the next generation prompt.

        Nothing that was drawn is written again: the template is asked only what it puts behind a
        turn, and between it and the next. `last_token` was drawn last: where it is the one that
        ends a turn, it does not come twice.

        Raises:
            InvalidRequest: as `render`; or the template leaves the turn out.
        """
        # Of another text than what was drawn: templates rewrite old turns, e.g. without thoughts.
        chat = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _TURN},
            *observation,
        ]
        whole = self._rendered(chat, tools, add_generation_prompt=True)
        _, found, behind = whole.partition(_TURN)
        if not found:
            raise InvalidRequest(
                "the base model's chat template leaves out what an assistant says before other "
                "messages: it cannot be used for several turns",
                field="environment",
            )
        ends = [end for text in self.special_tokens if (end := behind.find(text)) >= 0]
        end = min(ends, default=0)
        if not ends or behind[:end].strip():  # It ends turns without a token of its own.
            return self._ids(behind)
        ids = self._ids(behind[end:])
        return ids[1:] if ids[0] == last_token else ids

    @property
    def special(self) -> Mapping[int, str]:
        """The special tokens by id, as text."""
        return self._special

    @property
    def special_tokens(self) -> list[str]:
        """As text, longest first."""
        return sorted(self._special.values(), key=len, reverse=True)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        if self._template is None:
            raise InvalidRequest(
                "the base model has no chat template; use prompt.text", field="prompt.messages"
            )
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._named,
            )
        except Exception as error:
            # A template is a program of the model's, which may take badly what it did not expect.
            raise InvalidRequest(
                f"the base model's chat template refuses the messages: {error}",
                field="prompt.messages",
            ) from error

    def answer(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[int]:
        """An assistant's turn that says `text` after `render(messages)`, up to its end token.

        It is what the chat template writes after its generation prompt, with what it puts before
        the text; where it writes such a turn in another way than it asks for one, the text alone.
        It ends with the first special token behind the text (what follows, as a line break, nobody
        would generate), or where there is none with the end of sequence.

        Raises:
            InvalidRequest: as `render` and `ending`.
        """
        asked = self._rendered(messages, add_generation_prompt=True)
        turn = {"role": "assistant", "content": text}
        answered = self._rendered([*messages, turn], add_generation_prompt=False)
        head, found, behind = answered.rpartition(text.strip())
        if found and head.startswith(asked):
            text = head.removeprefix(asked) + found
        for token in self._ids(behind) if found else ():
            if token in self._special:
                return [*self._ids(text), token]
        return self.ending(text)

    def ending(self, text: str) -> list[int]:
        """What goes on after another text and ends there: without start, with end of sequence.

        Raises:
            InvalidRequest: the tokenizer's files name no end of sequence.
        """
        end = self._tokenizer.token_to_id(self._named.get("eos_token", ""))
        if end is None:
            raise InvalidRequest(
                "the base model's tokenizer_config.json names no eos_token for a completion to end "
                "with",
                field="sft",
            )
        return [*self._ids(text), end]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id."""
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return ids

    def encode(self, text: str) -> list[int]:
        """Plain text, with the special tokens that the tokenizer adds to a text's start."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text, without special tokens or with them."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text


def load_tokenizer(base_model: str) -> ModelTokenizer:
    """The tokenizer of `base_model`: a local folder, or else a hub id, which is fetched. Blocks.

    Raises:
        InvalidRequest: neither of both, or there is no tokenizer.json in it.
    """
    folder = Path(base_model)
    if not folder.is_dir():
        folder = _fetched(base_model)
    if not (folder / _TOKENIZER).is_file():
        raise InvalidRequest(
            f"base model {base_model!r}: {folder} has no {_TOKENIZER}",
            field="base_model",
            value=base_model,
        )
    config = _read_json(folder / _CONFIG)
    named = {name: _text(config[name]) for name in _NAMED if config.get(name) is not None}
    tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
    # A file may say to cut or to fill up every text: right for a classifier, never for a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=True)
            for token in [*named.values(), *_extra(config)]
            if token not in added
        ]
    )
    source = _template_source(folder, config)
    template = _environment().from_string(source) if source is not None else None
    return ModelTokenizer(tokenizer, template, named, has_tools=bool(_TOOLS.search(source or "")))


def _fetched(base_model: str) -> Path:
    try:
        return Path(snapshot_download(base_model, allow_patterns=[_TOKENIZER, _CONFIG, _TEMPLATE]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InvalidRequest(
            f"base model {base_model!r} is neither a folder nor a hub id that can be fetched: "
            f"{error}",
            field="base_model",
            value=base_model,
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return values


def _text(token: str | dict[str, Any]) -> str:
    """A token is written as text, or as an object with it and how it matches."""
    return token if isinstance(token, str) else str(token["content"])


def _extra(config: Mapping[str, Any]) -> list[str]:
    """Special tokens without a name of their own; the second key is the older one."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [_text(token) for token in (extra.values() if isinstance(extra, dict) else extra)]


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / _TEMPLATE
    if file.is_file():
        return file.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name: the one for chats without tools
        return next((str(t["template"]) for t in template if t["name"] == "default"), None)
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: the names and settings that transformers gives them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


class _Generation(Extension):
    """{% generation %} marks what the assistant says in some templates; it changes no text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(  # jinja2's own escapes HTML
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - as templates call it
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002 - the same
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return dt.datetime.now().astimezone().strftime(form)

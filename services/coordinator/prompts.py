"""Tasks to prompts: {name} in a template is a task's field, {{ and }} are braces."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from rollmesh.chat import Message
from rollmesh.chat_template import template_messages
from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from rollmesh.job import JobSpec, PromptSpec, SftSpec
    from services.coordinator.datasets import Task
    from services.coordinator.ports import Tokenizer


def check_templates(spec: JobSpec, tasks: Iterable[Task]) -> None:
    """Refuse a spec whose prompt or reference asks for what one of `tasks` does not have.

    Held-out tasks need no completion to learn: see `check_completions`.

    Raises:
        InvalidRequest: a malformed template, or a missing field, with the task and those it has.
    """
    templates = _prompt_templates(spec.prompt) if spec.prompt is not None else []
    if spec.reward is not None:
        templates.append(("reward.reference", spec.reward.reference))
    needed = [(field, name) for field, text in templates for _, name in _parts(text, field) if name]
    for task in tasks:
        for field, name in needed:
            _value(task.fields, name, task_id=task.id, field=field)


def check_completions(spec: JobSpec, tasks: Iterable[Task]) -> None:
    """Refuse a spec of supervised fine-tuning whose completion asks for what a task has not.

    Raises:
        InvalidRequest: as check_templates; or nothing is left of a completion.
    """
    if spec.sft is not None:
        for task in tasks:
            _completion(spec.sft, task)


def fill(template: str, task: Task, *, field: str) -> str:
    """`template` with the fields of `task`; `field` is the template's path in the job's spec.

    Raises:
        InvalidRequest: as check_templates.
    """
    return "".join(
        literal + (_value(task.fields, name, task_id=task.id, field=field) if name else "")
        for literal, name in _parts(template, field)
    )


def task_messages(prompt: PromptSpec | None, task: Task) -> list[Message]:
    """The chat that `task` begins: by the job's templates, else the task's own.

    Raises:
        InvalidRequest: as check_templates.
    """
    if prompt is None:
        return list(task.messages)
    return [
        Message(message.role, fill(template, task, field=field))
        for message, (field, template) in zip(
            prompt.messages, _prompt_templates(prompt), strict=True
        )
    ]


def prompt_token_ids(prompt: PromptSpec | None, task: Task, tokenizer: Tokenizer) -> list[int]:
    """The prompt of `task`: a chat by the model's template, or plain text as it is.

    Raises:
        InvalidRequest: as check_templates; or nothing is left of the prompt.
    """
    if prompt is None or prompt.messages:
        token_ids = tokenizer.render(template_messages(task_messages(prompt, task)))
    else:
        token_ids = tokenizer.encode(fill(prompt.text, task, field="prompt.text"))
    if not token_ids:
        raise InvalidRequest(
            f"prompt: task {task.id!r} makes an empty one", field="prompt", value=task.id
        )
    return token_ids


def completion_token_ids(spec: JobSpec, task: Task, tokenizer: Tokenizer) -> list[int]:
    """What is to be learned after the prompt of `task`, with what ends it.

    Raises:
        InvalidRequest: as check_completions.
    """
    assert spec.sft is not None and spec.prompt is not None  # noqa: S101, PT018 - else there is none
    text = _completion(spec.sft, task)
    if spec.prompt.messages:
        return tokenizer.answer(template_messages(task_messages(spec.prompt, task)), text)
    return tokenizer.ending(text)


def _completion(sft: SftSpec, task: Task) -> str:
    text = fill(sft.completion, task, field="sft.completion")
    if not text.strip():
        raise InvalidRequest(
            f"sft.completion: task {task.id!r} makes an empty one",
            field="sft.completion",
            value=task.id,
        )
    return text


def _prompt_templates(prompt: PromptSpec) -> list[tuple[str, str]]:
    """Path in the spec and text of each template of a prompt."""
    if prompt.messages:
        return [
            (f"prompt.messages[{index}].content", message.content)
            for index, message in enumerate(prompt.messages)
        ]
    return [("prompt.text", prompt.text)]


def _parts(template: str, field: str) -> Iterator[tuple[str, str | None]]:
    """Pieces of literal text, each with the name of the field that follows it (None: none)."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _malformed(template, field, str(error)) from None
    for literal, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise _malformed(template, field, "a field is {name} and nothing more")
        yield literal, name


def _malformed(template: str, field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {problem}; braces that are text are written {{{{ and }}}}",
        field=field,
        value=template[:200],
    )


def _value(fields: Mapping[str, str], name: str, *, task_id: str, field: str) -> str:
    try:
        return fields[name]
    except KeyError:
        known = ", ".join(sorted(fields))
        raise InvalidRequest(
            f"{field}: task {task_id!r} has no field {name!r}; it has: {known}",
            field=field,
            value=name,
            allowed=known,
        ) from None

"""Batches of answers, as large as every server takes them."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rollmesh import chat

MAX_BATCH_BYTES = 3 * 1024 * 1024
"""Of one Score call. Servers refuse messages of more than 4 MiB where nobody has told them
otherwise: that is gRPC's default in every language."""
_AROUND = 16
"""Bytes around each text, at most: the tags and lengths of its field and of what that is in."""


def cut_up(
    items: Sequence[chat.Answered], max_items: int, *, environment: str
) -> list[Sequence[chat.Answered]]:
    """`items` in order, in batches of at most `max_items` (0: any number) and MAX_BATCH_BYTES.

    Raises:
        InvalidRequest: one item alone is larger; names it.
    """
    batches: list[Sequence[chat.Answered]] = []
    first = num_bytes = 0
    for index, item in enumerate(items):
        size = _size(item)
        if size > MAX_BATCH_BYTES:
            raise InvalidRequest(
                f"items[{index}]: an answer to task {item.task.id[:63]!r} has, with its task and "
                f"chat, {size} bytes, allowed are {MAX_BATCH_BYTES}",
                environment=environment,
                field=f"items[{index}]",
                value=size,
                allowed=MAX_BATCH_BYTES,
            )
        is_full = max_items and index - first == max_items
        if is_full or num_bytes + size > MAX_BATCH_BYTES:
            batches.append(items[first:index])
            first, num_bytes = index, 0
        num_bytes += size
    return [*batches, items[first:]]


def _size(item: chat.Answered) -> int:
    """Bytes on the wire, rather a few more."""
    task = item.task
    fields = chain.from_iterable(task.fields.items())
    texts = chain([task.id, task.split], fields, _texts(task.messages), _texts(item.messages))
    return _AROUND + sum(_AROUND + len(text.encode()) for text in texts)


def _texts(messages: Sequence[chat.Message]) -> Iterator[str]:
    for message in messages:
        yield from (message.role, message.content, message.tool_call_id)
        for call in message.tool_calls:
            yield from (call.id, call.name, call.arguments_json)

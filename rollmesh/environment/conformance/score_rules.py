"""Rules of single turns."""

from __future__ import annotations

import asyncio
import math
import random
from typing import TYPE_CHECKING

import grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.environment.conformance import actions
from rollmesh.environment.conformance.rules import Broken, Rule, Skipped, rule

if TYPE_CHECKING:
    from rollmesh.environment.conformance.subject import Subject

_BATCH = 16
_BATCHES_AT_ONCE = 16


def _item(task: pb.Task, answer: pb.Message) -> pb.ScoreItem:
    return pb.ScoreItem(task=task, messages=[*task.messages, answer])


def _batch(subject: Subject) -> list[pb.ScoreItem]:
    """Up to 16 items that are worth different things, as far as one can tell."""
    limit = subject.info.limits.max_score_batch
    size = min(_BATCH, limit) if limit > 0 else _BATCH
    answers = [
        *actions.TAME,
        *(value for task in subject.tasks for value in task.fields.values()),
    ]
    return [
        _item(subject.tasks[n % len(subject.tasks)], actions.text(answers[n % len(answers)]))
        for n in range(size)
    ]


@rule("tasks-listed")
async def scores(subject: Subject) -> None:
    """Score answers a batch with one finite score for each item.

    None of them is a failure, for a bad answer is a reward.
    """
    if not subject.info.has_score:
        raise Skipped("it has no Score")
    _check(await subject.score(_batch(subject)))


@rule("scores")
async def scores_any_answer(subject: Subject) -> None:
    """Any answer, empty, long, of odd characters or with calls of tools, gets a finite reward."""
    rng = random.Random(0)  # noqa: S311 - no secret
    for answer in actions.odd(subject.info.tools, rng):
        try:
            _check(await subject.score([_item(subject.tasks[0], answer)]))
        except Broken as broken:
            raise Broken(f"the answer {_shown(answer)}: {broken}") from None
        except grpc.aio.AioRpcError as error:
            raise Broken(f"the answer {_shown(answer)} ends in {error.code().name}") from None


@rule("scores")
async def scores_in_order(subject: Subject) -> None:
    """The scores come in the order of the items, one by one the same as together.

    Only where the environment promises to be deterministic.
    """
    if not subject.info.deterministic:
        raise Skipped("it does not promise to be deterministic")
    batch = _batch(subject)
    together = await subject.score(batch)
    turned = await subject.score(batch[::-1])
    if [each.reward for each in turned[::-1]] != [each.reward for each in together]:
        raise Broken("a batch turned round is not scored the other way round")
    for place, item in enumerate(batch):
        (alone,) = await subject.score([item])
        if alone.reward != together[place].reward:
            raise Broken(
                f"item {place} is worth {together[place].reward:g} in a batch, and "
                f"{alone.reward:g} alone"
            )


@rule("scores")
async def scores_at_once(subject: Subject) -> None:
    """Many batches at once are all scored."""
    batch = _batch(subject)
    calls = (subject.score(batch, patience=_BATCHES_AT_ONCE) for _ in range(_BATCHES_AT_ONCE))
    scored = await asyncio.gather(*calls)
    for each in scored:
        _check(each)


@rule("scores")
async def score_refuses_nothing(subject: Subject) -> None:
    """A batch without items is INVALID_ARGUMENT."""
    await subject.refused(
        subject.score([]), "a batch without items", grpc.StatusCode.INVALID_ARGUMENT
    )


@rule("scores")
async def score_refuses_too_many(subject: Subject) -> None:
    """A batch of more than limits.max_score_batch is INVALID_ARGUMENT."""
    limit = subject.info.limits.max_score_batch
    if not limit:
        raise Skipped("it has no max_score_batch")
    item = _batch(subject)[0]
    await subject.refused(
        subject.score([item] * (limit + 1)),
        f"a batch of {limit + 1}",
        grpc.StatusCode.INVALID_ARGUMENT,
    )


@rule("scores")
async def score_refuses_no_answer(subject: Subject) -> None:
    """An item whose last message is not the assistant's, or that has none, is INVALID_ARGUMENT."""
    task = subject.tasks[0]
    for what, messages in (
        ("an item without messages", []),
        ("an item that ends with the user's message", [pb.Message(role="user", content="1")]),
        ("an item that ends with a tool's message", [pb.Message(role="tool", content="1")]),
        ("a message of an unknown role", [pb.Message(role="nobody", content="1")]),
    ):
        await subject.refused(
            subject.score([pb.ScoreItem(task=task, messages=messages)]),
            what,
            grpc.StatusCode.INVALID_ARGUMENT,
        )


@rule("scores")
async def scores_foreign_tasks(subject: Subject) -> None:
    """A task that the environment has never heard of is no crash.

    A job with a dataset of its own sends such: it is scored by its fields, or refused as the
    caller's mistake.
    """
    for fields in ({}, {"question": "1+1", "answer": "2"}, {"x" * 1_000: "y" * 100_000}):
        task = pb.Task(id="no-such-task", fields=fields)
        try:
            _, *_ = await subject.score([_item(task, actions.text("2"))])
        except grpc.aio.AioRpcError as error:
            if error.code() not in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}:
                raise


@rule("scores")
async def score_malformed(subject: Subject) -> None:
    """Bytes that are no message end the call with an error, and the server goes on."""
    call = subject.raw("Score", stream=False)
    for garbage in (b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f", bytes(range(256))):
        try:
            await call(garbage, timeout=subject.answer_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}:
                raise Broken(f"bytes that are no message: {error.code().name}") from None
        else:
            raise Broken("bytes that are no message are answered as if they were one")
    _check(await subject.score(_batch(subject)[:1]))


def _check(scored: list[pb.Scored]) -> None:
    for place, each in enumerate(scored):
        if each.failure:
            raise Broken(f"item {place} failed: {each.failure[:200]}")
        for name, value in {"reward": each.reward, **each.rewards}.items():
            if not math.isfinite(value):
                raise Broken(f"{name} of item {place} is {value}")


def _shown(answer: pb.Message) -> str:
    shown = repr(answer.content[:20])
    called = ", ".join(f"{call.name}({call.arguments_json[:20]})" for call in answer.tool_calls[:3])
    return f"{shown} with calls {called}" if called else shown


RULES: tuple[Rule, ...] = (
    scores,
    scores_any_answer,
    scores_in_order,
    scores_at_once,
    score_refuses_nothing,
    score_refuses_too_many,
    score_refuses_no_answer,
    scores_foreign_tasks,
    score_malformed,
)

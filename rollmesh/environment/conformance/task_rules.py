"""Rules of tasks: their lists, pages and ids."""

from __future__ import annotations

import grpc

from rollmesh.api.environment.v1 import environment_service_pb2 as pb
from rollmesh.chat import MAX_TASK_ID
from rollmesh.environment.conformance.rules import Broken, Rule, Skipped, rule
from rollmesh.environment.conformance.subject import MAX_LISTED, Subject

_ROLES = ("system", "user", "assistant", "tool")
_FEW = 8


@rule("described")
async def tasks_listed(subject: Subject) -> None:
    """Every split has tasks, each of which says its split.

    Where there are no episodes a task has messages: the chat that is answered.
    """
    for split in subject.info.splits:
        listed = await subject.listed(split.name)
        if not listed:
            raise Broken(f"split {split.name!r} lists no tasks")
        for task in listed:
            if task.split != split.name:
                raise Broken(f"task {task.id!r} of {split.name!r} says its split is {task.split!r}")
            if not (subject.info.has_episodes or task.messages):
                raise Broken(f"task {task.id!r} has no messages, and there are no episodes")
            for message in task.messages:
                if message.role not in _ROLES:
                    raise Broken(f"task {task.id!r} has a message of {message.role!r}")
        subject.tasks.extend(listed[:_FEW])


@rule("tasks-listed")
async def tasks_stable(subject: Subject) -> None:
    """A split that is listed twice is the same tasks in the same order."""
    for split in subject.info.splits:
        first, second = [await subject.listed(split.name) for _ in range(2)]
        if first != second:
            place = next(
                (
                    place
                    for place, (one, other) in enumerate(zip(first, second, strict=False))
                    if one != other
                ),
                min(len(first), len(second)),
            )
            raise Broken(f"split {split.name!r} differs from task {place} on when listed again")


@rule("tasks-listed", "tasks-stable")
async def tasks_paged(subject: Subject) -> None:
    """The pages of a split have no more than page_size tasks, and are the whole split.

    A page_token that the server did not make is INVALID_ARGUMENT.
    """
    split = subject.info.splits[0].name
    whole = await subject.listed(split)
    size = max(1, len(whole) // 3)
    paged = await subject.listed(split, page_size=size)
    if [task.id for task in paged[:MAX_LISTED]] != [task.id for task in whole[:MAX_LISTED]]:
        raise Broken(f"pages of {size} are not the tasks that come without a page_size")
    for token in ("no-such-token", "ü" * 500):
        request = pb.ListTasksRequest(environment=subject.name, split=split, page_token=token)
        await subject.refused(
            subject.stub.ListTasks(request, timeout=subject.answer_s),
            f"the page_token {token[:20]!r}",
            grpc.StatusCode.INVALID_ARGUMENT,
        )


@rule("tasks-listed")
async def task_ids(subject: Subject) -> None:
    """Each task has an id of 1 to 255 characters that no other task of the environment has."""
    seen: dict[str, str] = {}
    for split in subject.info.splits:
        for task in await subject.listed(split.name):
            if not 1 <= len(task.id) <= MAX_TASK_ID:
                raise Broken(f"an id in {split.name!r} has {len(task.id)} characters")
            if task.id in seen:
                raise Broken(
                    f"id {task.id!r} is in {seen[task.id]!r}, and once more in {split.name!r}"
                )
            seen[task.id] = split.name


@rule("tasks-listed")
async def tasks_counted(subject: Subject) -> None:
    """The num_tasks that Describe tells of a split is the number that it lists."""
    counted = [split for split in subject.info.splits if split.num_tasks]
    if not counted:
        raise Skipped("it does not say how many tasks its splits have")
    for split in counted:
        found = len(await subject.listed(split.name))
        if found < min(split.num_tasks, MAX_LISTED) or (found > split.num_tasks):
            raise Broken(f"split {split.name!r} has {found} tasks, said are {split.num_tasks}")


@rule("tasks-listed", "tasks-stable", "task-ids")
async def task_got(subject: Subject) -> None:
    """GetTask answers a task as ListTasks lists it."""
    for split in subject.info.splits:
        listed = await subject.listed(split.name)
        for task in (listed[0], listed[len(listed) // 2], listed[-1]):
            request = pb.GetTaskRequest(environment=subject.name, task_id=task.id)
            got = await subject.stub.GetTask(request, timeout=subject.answer_s)
            if got.task != task:
                raise Broken(f"GetTask of {task.id!r} is not the task that is listed")


@rule()
async def task_unknown(subject: Subject) -> None:
    """A task that does not exist is NOT_FOUND."""
    for task_id in ("", "no-such-task", "x" * 300, "../../etc/passwd", "ü\n' OR 1=1"):
        request = pb.GetTaskRequest(environment=subject.name, task_id=task_id)
        await subject.refused(
            subject.stub.GetTask(request, timeout=subject.answer_s),
            f"GetTask of {task_id[:20]!r}",
            grpc.StatusCode.NOT_FOUND,
        )


@rule()
async def split_unknown(subject: Subject) -> None:
    """A split that does not exist is INVALID_ARGUMENT."""
    for split in ("", "no-such-split", "../x"):
        request = pb.ListTasksRequest(environment=subject.name, split=split)
        await subject.refused(
            subject.stub.ListTasks(request, timeout=subject.answer_s),
            f"ListTasks of split {split!r}",
            grpc.StatusCode.INVALID_ARGUMENT,
        )


RULES: tuple[Rule, ...] = (
    tasks_listed,
    tasks_stable,
    tasks_paged,
    task_ids,
    tasks_counted,
    task_got,
    task_unknown,
    split_unknown,
)

"""Tasks of an environment: ids, pages, and what an author may get wrong."""

from __future__ import annotations

import pytest

from rollmesh.chat import Message, Split, Task
from rollmesh.environment import Generated, task_of
from rollmesh.environment.tasks import MAX_PAGE_BYTES, MAX_PAGE_TASKS, Tasks
from rollmesh.errors import InvalidRequest, NotFound


def listed(tasks, split, size=0):
    found, token = [], ""
    while True:
        page, token = tasks.page(split, size, token)
        found += page
        if not token:
            return found


def test_text_is_what_the_user_says_and_gets_an_id_by_its_place():
    tasks = Tasks({"train": ["a", task_of("b", answer="B")], "heldout": [Task("own")]})
    assert listed(tasks, "train") == [
        Task("train-0", "train", (Message("user", "a"),)),
        Task("train-1", "train", (Message("user", "b"),), {"answer": "B"}),
    ]
    assert listed(tasks, "heldout") == [Task("own", "heldout")]
    assert tasks.splits == (Split("train", 2), Split("heldout", 1))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("make", [lambda n: [f"t{i}" for i in range(n)], None])
def test_the_pages_are_all_tasks_in_their_order_and_no_larger_than_asked(size, make):
    tasks = Tasks({"train": make(7) if make else Generated(7, lambda n: f"t{n}")})
    assert [task.id for task in listed(tasks, "train", size)] == [f"train-{n}" for n in range(7)]
    page, _ = tasks.page("train", size, "")
    assert len(page) == min(size or 7, 7)


def test_a_page_is_bounded_in_tasks_and_in_text():
    many = Tasks({"train": Generated(3 * MAX_PAGE_TASKS, str)})
    assert len(many.page("train", 10**6, "")[0]) == MAX_PAGE_TASKS
    long = Tasks({"train": Generated(100, lambda n: "x" * (MAX_PAGE_BYTES // 4))})
    assert len(long.page("train", 0, "")[0]) == 4
    assert len(listed(long, "train")) == 100
    huge = Tasks({"train": [task_of("a", text="ü" * MAX_PAGE_BYTES), "b"]})
    assert len(huge.page("train", 0, "")[0]) == 1


@pytest.mark.parametrize("split", [["a", "b", Task("own")], Generated(3, str)])
def test_each_task_is_got_by_its_id(split):
    tasks = Tasks({"train": split, "train-2": ["c"]})
    for name in ("train", "train-2"):
        for task in listed(tasks, name):
            assert tasks.get(task.id) == task


@pytest.mark.parametrize(
    "task_id",
    ["", "a", "train", "train-3", "train-00", "train--1", "train-١", "x-0", "train-2", "t" * 999],
)
def test_a_task_that_is_not_there_is_not_found(task_id):
    tasks = Tasks({"train": ["a", "b", Task("own")]})
    with pytest.raises(NotFound):
        tasks.get(task_id)


@pytest.mark.parametrize(
    ("split", "size", "token", "field"),
    [
        ("", 0, "", "split"),
        ("test", 0, "", "split"),
        ("train", -1, "", "page_size"),
        ("train", 0, "1", "page_token"),
        ("train", 0, "heldout:1", "page_token"),
        ("train", 0, "train:0", "page_token"),
        ("train", 0, "train:3", "page_token"),
        ("train", 0, "train:01", "page_token"),
        ("train", 0, "train:99999999999999999999", "page_token"),
    ],
)
def test_a_page_that_cannot_be_is_refused_by_its_field(split, size, token, field):
    tasks = Tasks({"train": ["a", "b", "c"], "heldout": ["d", "e", "f"]})
    with pytest.raises(InvalidRequest) as caught:
        tasks.page(split, size, token)
    assert caught.value.context["field"] == field


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "at least one split"),
        ({"Train": ["a"]}, "no name of a split"),
        ({"train": []}, "at least one task"),
        ({"train": "abc"}, "sequence"),
        ({"train": Generated(0, str)}, "at least one task"),
        ({"train": [Task("x")], "heldout": [Task("x")]}, "two tasks have the id"),
        ({"train": ["a", Task("train-0")]}, "another task by its place"),
        ({"train": [Task("x" * 256)]}, "256 characters"),
    ],
)
def test_what_an_author_gets_wrong_is_told_at_once(splits, message):
    with pytest.raises(ValueError, match=message):
        Tasks(splits)


def test_a_generated_task_has_no_id_of_its_own():
    tasks = Tasks({"train": Generated(2, lambda n: Task(f"mine-{n}"))})
    with pytest.raises(ValueError, match="mine-1"):
        tasks.get("train-1")


def test_generated_tasks_are_a_sequence():
    made = Generated(5, str)
    assert [task.messages[0].content for task in made[1:4]] == ["1", "2", "3"]
    assert len(list(made)) == 5

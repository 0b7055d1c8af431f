"""Runs a completion in the sandbox and answers the tests' questions about it.

The completion shares this process and can make it say what it likes. It knows no test, and what it
says is worth what the values in it are worth.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from peer import Peer  # type: ignore[import-not-found] # it lies beside it there

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

null = os.open("/dev/null", os.O_RDWR)
questions = os.fdopen(os.dup(0), encoding="utf-8", newline="\n")
answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
# What the completion prints is no answer, and it has nothing to read.
for number in (0, 1, 2):
    os.dup2(null, number)
sys.set_int_max_str_digits(0)
completion = ModuleType("completion")
sys.modules["completion"] = completion


def send(line: str) -> None:
    """Say a line to the tests."""
    answers.write(line + "\n")
    answers.flush()


def receive() -> str:
    """The next line that they say."""
    line = questions.readline()
    if not line:
        os._exit(0)
    return line


def begin(in_place: bool) -> None:  # noqa: FBT001 - they say only values
    """Run the completion."""
    peer.in_place = in_place
    with open("completion.py", encoding="utf-8") as file:  # noqa: PTH123
        code = compile(file.read(), "completion.py", "exec", dont_inherit=True)
    exec(code, completion.__dict__)  # noqa: S102 - what a sandbox is for


def name(wanted: str) -> Any:
    """What the completion calls so."""
    if wanted not in completion.__dict__:
        raise NameError(f"the completion has no {wanted!r}")
    return completion.__dict__[wanted]


def call(function: Any, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """What it returns, and what became of its arguments."""
    value = function(*args, **kwargs)
    return [value, args if peer.in_place else []]


def following(iterator: Any) -> list[Any]:
    """The next value alone; empty: there is none."""
    for value in iterator:
        return [value]
    return []


peer = Peer(
    send,
    receive,
    {
        "begin": begin,
        "name": name,
        "call": call,
        "attribute": getattr,
        "set_attribute": setattr,
        "item": lambda value, key: value[key],
        "set_item": lambda value, key, new: value.__setitem__(key, new),
        "length": len,
        "truth": bool,
        "iterator": iter,
        "next": following,
        "string": str,
        "representation": repr,
    },
)
while True:
    peer.serve_one()

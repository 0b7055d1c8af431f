"""Named generators of tasks: what a job's prompts are made from.

A generator is pure: the same parameters and seed give the same tasks everywhere. The split of a
problem is decided by a hash of the problem itself, so train and heldout never overlap, whatever
the seeds.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from rollmesh.errors import InvalidRequest

if TYPE_CHECKING:
    from rollmesh.chat import Message

Split = Literal["train", "heldout"]

OPERATIONS: Mapping[str, Callable[[int, int], int]] = MappingProxyType(
    {"+": operator.add, "-": operator.sub}
)
MAX_DIGITS = 9
MAX_COUNT = 100_000


@dataclass(frozen=True)
class Task:
    """One problem: the fields a prompt template and a reward may use."""

    id: str
    """Names the problem itself: equal for equal problems, also across seeds and runs."""
    fields: dict[str, str]
    """What templates and rewards refer to by name."""
    split: str = ""
    """Of the environment whose task it is; empty: of none."""
    messages: tuple[Message, ...] = ()
    """The chat to answer, of an environment's task for a single turn."""


Generator = Callable[..., list[Task]]
"""Takes `seed` and its own parameters, all by keyword; refuses bad ones with InvalidRequest."""


def arithmetic(
    *,
    seed: int,
    count: int,
    split: Split,
    max_digits: int = 2,
    operations: Sequence[str] = ("+", "-"),
) -> list[Task]:
    """Sums and differences of two integers, as `question` ("4-91") and `answer` ("-87").

    Problems repeat only once every problem of the split has been drawn.
    """
    count = _up_to(MAX_COUNT, "count", count)
    max_digits = _up_to(MAX_DIGITS, "max_digits", max_digits)
    _one_of(get_args(Split), "split", split)
    _some_of(OPERATIONS, "operations", operations)

    operands = 10**max_digits
    rng = random.Random(seed)  # noqa: S311 - guards nothing
    tasks: list[Task] = []
    while True:
        for index in _shuffled(operands * operands * len(operations), rng):
            pair, which = divmod(index, len(operations))
            a, b = divmod(pair, operands)
            question = f"{a}{operations[which]}{b}"
            if _split_of(question) == split:
                answer = str(OPERATIONS[operations[which]](a, b))
                fields = {"question": question, "answer": answer}
                tasks.append(Task(id=f"arithmetic/{question}", fields=fields))
                if len(tasks) == count:
                    return tasks


GENERATORS: Mapping[str, Generator] = MappingProxyType({"arithmetic": arithmetic})


def generate(name: str, parameters: Mapping[str, object], *, seed: int) -> list[Task]:
    """The tasks of the generator called `name`; InvalidRequest says what would be allowed."""
    _one_of(GENERATORS, "generator", name)
    generator = GENERATORS[name]
    known = dict(inspect.signature(generator).parameters)
    del known["seed"]
    for key in parameters:
        _one_of(known, "parameters", key)
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in parameters:
            raise InvalidRequest(f"generator {name!r} needs {key!r}", field=key, value=None)
    return generator(seed=seed, **parameters)


def _split_of(question: str) -> Split:
    """Heldout for about a tenth of all problems."""
    digest = hashlib.sha256(question.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8]) % 10 == 0 else "train"


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """Every index below `size` once, in random order, remembering only those already drawn.

    It is a Fisher-Yates shuffle whose untouched places are implied, so `size` may be huge.
    """
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        drawn = rng.randint(0, last)
        yield moved.get(drawn, drawn)
        moved[drawn] = moved.pop(last, last)


def _one_of(allowed: Iterable[str], field: str, value: object) -> None:
    names = list(allowed)
    if value not in names:
        raise _refusal(field, value, f"one of {', '.join(map(repr, names))}")


def _some_of(allowed: Iterable[str], field: str, values: object) -> None:
    names = list(allowed)
    if (
        not isinstance(values, Sequence)
        or not values
        or len(set(map(repr, values))) < len(values)
        or any(value not in names for value in values)
    ):
        raise _refusal(field, values, f"a list of some of {', '.join(map(repr, names))}, each once")


def _up_to(most: int, field: str, value: object) -> int:
    """The integer meant by `value`; 8.0 is one, as JSON and protobuf's Struct know only numbers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise _refusal(field, value, f"an integer from 1 to {most}")
    return value


def _refusal(field: str, value: object, allowed: str) -> InvalidRequest:
    message = f"{field}: {value!r} is not {allowed}"
    return InvalidRequest(message, field=field, value=value, allowed=allowed)

"""Two processes that trust each other with values and with nothing else.

The completion runs in one, the tests in the other, and each asks the other by lines of JSON. Plain
values travel by value. Whatever else the completion returns stays there, and the tests hold a
`Remote` of it; so no method of the completion's ever decides what is equal to what.
"""

from __future__ import annotations

import builtins
import json
import math

TYPE_CHECKING = False  # typing takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any


class Ended(BaseException):
    """The other side is gone; the message says why."""


class Failed(Exception):
    """An exception of the other side's that is none of Python's own."""


class Remote:
    """Something that lives on the other side. It is equal to itself alone."""

    def __init__(self, peer: Peer, number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def _ask(self, op: str, *values: object) -> Any:
        return self.__dict__["_peer"].ask(op, self, *values)

    def __call__(self, *args: object, **kwargs: object) -> Any:  # noqa: D102
        return self.__dict__["_peer"].call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._ask("attribute", name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("set_attribute", name, value)

    def __getitem__(self, key: object) -> Any:
        return self._ask("item", key)

    def __setitem__(self, key: object, value: object) -> None:
        self._ask("set_item", key, value)

    def __len__(self) -> int:
        length: int = self._ask("length")
        return length

    def __bool__(self) -> bool:
        return self._ask("truth") is True

    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iterator")
        while step := self.__dict__["_peer"].ask("next", iterator):
            yield step[0]

    def __str__(self) -> str:
        return str(self._ask("string"))

    def __repr__(self) -> str:
        return str(self._ask("representation"))


class Peer:
    """One side.

    Args:
        send: takes a line to the other side.
        receive: the next line from there.
        serves: what the other side may ask, by name.
    """

    def __init__(
        self,
        send: Callable[[str], None],
        receive: Callable[[], str],
        serves: Mapping[str, Callable[..., Any]],
    ) -> None:
        self._send = send
        self._receive = receive
        self._serves = serves
        self._objects: list[object] = []
        self._numbers: dict[int, int] = {}
        self.in_place = False
        self.num_asked = 0

    def ask(self, op: str, *values: object) -> Any:
        """What the other side answers; what it asks meanwhile is answered too."""
        self.num_asked += 1
        self._say("ask", op, [self._to_json(value) for value in values])
        while True:
            kind, *rest = json.loads(self._receive())
            if kind == "ask":
                self._serve(*rest)
            elif kind == "error":
                raise _error(*rest)
            else:
                return self._from_json(rest[0])

    def call(self, function: Remote, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """Call it there. With `in_place`, lists, dicts and sets then hold what they hold there."""
        value, after = self.ask("call", function, list(args), kwargs)
        if self.in_place:
            for mine, theirs in zip(args, after, strict=False):
                _take_over(mine, theirs)
        return value

    def serve_one(self) -> None:
        """Answer one question."""
        _, *rest = json.loads(self._receive())
        self._serve(*rest)

    def _serve(self, op: str, values: list[Any]) -> None:
        try:
            answer = self._serves[op](*[self._from_json(value) for value in values])
            said = ("answer", self._to_json(answer))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - all of them are the other side's
            self._say("error", type(error).__name__, str(error)[:1000])
        else:
            self._say(*said)

    def _say(self, *message: object) -> None:
        self._send(json.dumps(message))

    def _to_json(self, value: Any) -> Any:
        """`value` as JSON: itself, or marked by its type, or as a number to know it by again."""
        if value is None or type(value) is bool:
            return value
        if isinstance(value, Remote):
            return {"yours": value.__dict__["_number"]}
        for kind, mark in _MARKS.items():
            if isinstance(value, kind):
                return mark(self._to_json, value)
        name = f"{type(value).__module__}.{type(value).__name__}"
        if name in _NUMBERS:
            return {name: str(value)}
        return {"mine": self._number(value)}

    def _number(self, value: object) -> int:
        """Kept for good, so that its id is not another's."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._numbers[id(value)]

    def _from_json(self, value: Any) -> Any:
        """What _to_json of the other side made."""
        if not isinstance(value, dict):
            return value
        ((mark, content),) = value.items()
        if mark == "mine":
            return Remote(self, content)
        if mark == "yours":
            return self._objects[content]
        if mark in _NUMBERS:
            module, _, name = mark.partition(".")
            return getattr(__import__(module), name)(content)
        return _UNMARKED[mark](self._from_json, content)


def _error(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # It takes more than a text.
            pass
    return Failed(f"{name}: {text}")


def _take_over(mine: Any, theirs: Any) -> None:
    if type(mine) is list and type(theirs) is list:
        mine[:] = theirs
    elif type(mine) is type(theirs) and type(mine) in {dict, set}:
        mine.clear()
        mine.update(theirs)


# Subclasses go as what they are of: a Counter is a dict, a named tuple a tuple.
_MARKS: dict[type, Callable[[Any, Any], Any]] = {
    int: lambda _, value: int(value),
    float: lambda _, value: float(value) if math.isfinite(value) else {"float": repr(value)},
    str: lambda _, value: str(value),
    complex: lambda _, value: {"complex": [repr(value.real), repr(value.imag)]},
    bytes: lambda _, value: {"bytes": value.hex()},
    bytearray: lambda _, value: {"bytearray": value.hex()},
    range: lambda _, value: {"range": [value.start, value.stop, value.step]},
    list: lambda inner, value: {"list": [inner(each) for each in value]},
    tuple: lambda inner, value: {"tuple": [inner(each) for each in value]},
    set: lambda inner, value: {"set": [inner(each) for each in value]},
    frozenset: lambda inner, value: {"frozenset": [inner(each) for each in value]},
    dict: lambda inner, value: {"dict": [[inner(key), inner(value[key])] for key in value]},
}
_UNMARKED: dict[str, Callable[[Any, Any], Any]] = {
    "float": lambda _, content: float(content),
    "complex": lambda _, content: complex(*map(float, content)),
    "bytes": lambda _, content: bytes.fromhex(content),
    "bytearray": lambda _, content: bytearray.fromhex(content),
    "range": lambda _, content: range(*content),
    "list": lambda inner, content: [inner(each) for each in content],
    "tuple": lambda inner, content: tuple(inner(each) for each in content),
    "set": lambda inner, content: {inner(each) for each in content},
    "frozenset": lambda inner, content: frozenset(inner(each) for each in content),
    "dict": lambda inner, content: {inner(key): inner(value) for key, value in content},
}
_NUMBERS = ("decimal.Decimal", "fractions.Fraction")

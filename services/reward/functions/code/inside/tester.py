"""Runs the tests in the sandbox, each against a completion that has just begun in another one.

It speaks to the service in lines: "T" how many tests there are, "N" for a new completion, "C" what
to ask the completion, "R" how a test went, "I" what is wrong with the tests themselves. It hears
"A" what the completion answers, "X" why it does not.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys

from peer import Ended, Peer, Remote  # type: ignore[import-not-found] # it lies beside it there

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Invalid(Exception):
    """The tests cannot be run, whatever the completion is."""


class Test:
    """One test: code to run, a function in it to call then, and what the completion has to have."""

    def __init__(
        self, name: str, setup: ast.Module, tree: ast.Module, function: str, names: list[str]
    ) -> None:
        self.name = name
        self.setup = setup
        self.tree = tree
        self.function = function
        self.names = names


class Telling(ast.NodeTransformer):
    """Makes `assert a == b` tell both where it fails."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt | list[ast.stmt]:
        """As ast.NodeTransformer says."""
        test = node.test
        if node.msg is not None or not isinstance(test, ast.Compare) or len(test.ops) != 1:
            return node
        left, right = ast.Name("__left__", ast.Load()), ast.Name("__right__", ast.Load())
        lines: list[ast.stmt] = [
            ast.Assign([ast.Name("__left__", ast.Store())], test.left),
            ast.Assign([ast.Name("__right__", ast.Store())], test.comparators[0]),
            ast.Assert(
                ast.Compare(left, test.ops, [right]),
                ast.Call(ast.Name("__told__", ast.Load()), [left, right], []),
            ),
        ]
        return [ast.copy_location(line, node) for line in lines]


def told(left: object, right: object) -> str:
    """What a comparison that fails says."""
    return f"{repr(left)[:200]} and {repr(right)[:200]}"


def parsed(text: str, field: str) -> ast.Module:
    """The code in `text`."""
    try:
        return ast.parse(text, field)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Invalid(f"{field}: not Python: {error}") from None


def tests_of(order: dict[str, Any]) -> list[Test]:
    """The tests, by what the reference says."""
    said = order["tests"]
    found: list[tuple[str, ast.Module, str]]
    if isinstance(said, list):
        found = [
            (f"tests[{index}]", parsed(text, f"tests[{index}]"), "")
            for index, text in enumerate(said)
        ]
    else:
        tree = parsed(said, "tests")
        functions = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
        ]
        if functions:
            found = [(name, parsed(said, "tests"), name) for name in functions]
        elif all(isinstance(node, ast.Assert) for node in tree.body):
            found = [(f"line {node.lineno}", ast.Module([node], []), "") for node in tree.body]
        else:
            found = [("tests", tree, "")]
    if not found:
        raise Invalid("tests: none")
    setup = parsed(order["setup"], "setup")
    return [checked(name, setup, tree, function, order["names"]) for name, tree, function in found]


def checked(
    name: str, setup: ast.Module, tree: ast.Module, function: str, given: list[str]
) -> Test:
    """A test that uses a completion."""
    names = sorted(names_of(setup, tree) | set(given))
    if not names:
        raise Invalid(f"{name}: it uses nothing that a completion could define")
    tree = ast.fix_missing_locations(Telling().visit(tree))
    return Test(name, setup, tree, function, names)


def names_of(*trees: ast.Module) -> set[str]:
    """The names that the completion is to have: those that are read, and are nobody else's."""
    read, bound = set(), {*dir(builtins), "__name__"}
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                read.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                bound.add(name)
            case ast.ClassDef(name=name):
                bound.add(name)
            case ast.alias(name=name, asname=other):
                bound.add((other or name).partition(".")[0])
    return read - bound


class Service:
    """The service, and the completion behind it."""

    def __init__(self) -> None:
        self._in = os.fdopen(os.dup(0), encoding="utf-8", newline="\n")
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)

    def say(self, kind: str, text: str = "") -> None:
        """Say a line."""
        self._out.write(f"{kind}{text}\n")
        self._out.flush()

    def hear(self) -> str:
        """What the completion says."""
        line = self._in.readline().rstrip("\n")
        if line[:1] == "A":
            return line[1:]
        raise Ended(line[1:] or "the service is gone")


def run(test: Test, order: dict[str, Any], service: Service) -> str:
    """What went wrong; empty: nothing."""
    peer = Peer(lambda line: service.say("C", line), service.hear, {"call": call_back})
    peer.in_place = order["in_place"]
    service.say("N")
    try:
        peer.ask("begin", order["in_place"])
        there: dict[str, Any] = {"__name__": "tests", "__told__": told}
        there |= here(peer, test.names)
        is_used = any(not isinstance(there.get(name), Remote | None) for name in test.names)
        num_asked = peer.num_asked
        for code, name in ((test.setup, "setup"), (test.tree, test.name)):
            exec(compile(code, name, "exec", dont_inherit=True), there)  # noqa: S102
        if test.function:
            there[test.function]()
    except Ended as ended:
        return f"the completion ended: {ended}"
    except BaseException as error:  # noqa: BLE001 - it fails, whatever it is
        return f"{type(error).__name__}: {error}"
    if peer.num_asked == num_asked and not is_used:
        raise Invalid(f"{test.name}: it passes without asking anything of the completion")
    return ""


def here(peer: Peer, names: list[str]) -> dict[str, Any]:
    """What the completion has of `names`."""
    found = {}
    for name in names:
        try:
            found[name] = peer.ask("name", name)
        except NameError:
            continue
    return found


def call_back(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All that the completion may ask: to call a function that the test handed to it."""
    return [function(*args, **kwargs), []]


def main() -> None:
    """Run all of them."""
    service = Service()
    with open("order.json", encoding="utf-8") as file:  # noqa: PTH123
        order = json.load(file)
    try:
        tests = tests_of(order)
        service.say("T", str(len(tests)))
        for test in tests:
            problem = run(test, order, service)
            service.say("R", json.dumps([test.name, problem[:1000]]))
    except Invalid as invalid:
        service.say("I", json.dumps(str(invalid)[:1000]))


sys.set_int_max_str_digits(0)
main()

"""The package reasoning-gym, kept from running what a model or a caller wrote.

Several of its tasks score an answer by `eval`, or by sympy's parser, which is eval too. Both are
replaced here, in the modules that use them, by ones that read values and formulas and run nothing.
tests/contract/test_reward_reasoning.py goes through the package for others.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
from typing import TYPE_CHECKING, Any

from rollmesh.errors import FailedPrecondition, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

LITERALS = (
    "algorithmic.binary_matrix",
    "algorithmic.number_sorting",
    "algorithmic.spiral_matrix",
    "algorithmic.string_insertion",
    "games.n_queens",
)
"""Modules whose `eval` reads a list in an answer or an entry."""
FORMULAS = ("games.countdown", "games.puzzle24")
"""Modules that have sympy's parse_expr; algebra has it from sympy itself."""
BITS = ("arithmetic.bitwise_arithmetic",)
"""Modules whose `eval` computes with integers and bits."""
LEFT_OUT = frozenset({"codeio", "composite"})
"""Tasks that run code which a model wrote, and one that is made up of others."""

_FORMULA = re.compile(r"[A-Za-z0-9\s+*/^(),.-]{0,2000}")
_BITS = re.compile(r"[0-9a-fA-Fx\s+*&|^~<>()-]{0,2000}")
_FUNCTIONS = frozenset({
    "Abs", "Ci", "Ei", "Integral", "Rational", "Si", "acos", "acosh", "acot", "acsc", "asec",
    "asin", "asinh", "atan", "atanh", "cos", "cosh", "cot", "coth", "csc", "csch", "erf", "erfi",
    "exp", "gamma", "ln", "log", "pi", "sec", "sech", "sin", "sinh", "sqrt", "tan", "tanh",
})  # fmt: skip


@functools.cache
def package() -> Any:
    """The package, safe to score with. Takes seconds, once.

    Raises:
        FailedPrecondition: it is not installed.
    """
    try:
        found = importlib.import_module("reasoning_gym")
    except ModuleNotFoundError:
        raise FailedPrecondition(
            "this reward service has no reasoning-gym: install the package", value="reasoning-gym"
        ) from None
    sympy: Any = importlib.import_module("sympy")
    parse = sympy.parse_expr

    def formula(text: str, *args: object, **options: object) -> Any:
        _check_formula(text)
        return parse(text, *args, **options)

    sympy.parse_expr = formula
    for modules, name, replacement in (
        (LITERALS, "eval", ast.literal_eval),
        (BITS, "eval", _bits),
        (FORMULAS, "parse_expr", formula),
    ):
        for module in modules:
            vars(importlib.import_module(f"reasoning_gym.{module}"))[name] = replacement
    return found


def dataset_names() -> list[str]:
    """The tasks that there are, by name."""
    factory = importlib.import_module(f"{package().__name__}.factory")
    return sorted(set(factory.DATASETS) - LEFT_OUT)


def dataset(name: str, config: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """The tasks `name`, as the package's dataset; its item i is a function of all of these and i.

    Raises:
        InvalidRequest: there are none of that name, or they do not take `config`; `field` is
            "dataset" or "config".
    """
    return _dataset(name, json.dumps(config, sort_keys=True), seed, size)


@functools.lru_cache(maxsize=32)
def _dataset(name: str, config: str, seed: int, size: int) -> Any:
    known = dataset_names()
    if name not in known:
        raise InvalidRequest(
            f"{name[:100]!r} is not among reasoning-gym's tasks: {', '.join(known)}",
            field="dataset",
            value=name[:100],
            allowed=", ".join(known),
        )
    try:
        return package().create_dataset(name, seed=seed, size=size, **json.loads(config))
    except (AssertionError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"{name} does not take {config[:200]}: {error}"[:500],
            field="config",
            value=config[:100],
        ) from None


def _check_formula(text: str) -> None:
    """Raise ValueError on what is more than numbers, letters, operators and known functions.

    A point may stand within a number alone: after a name it would reach into Python.
    """
    if not _FORMULA.fullmatch(text) or re.search(r"[A-Za-z)]\s*\.|\.\s*[A-Za-z(]", text):
        raise ValueError("not a formula")
    names = re.findall(r"[A-Za-z][A-Za-z0-9]*", text)
    if not all(len(name) == 1 or name in _FUNCTIONS for name in names):
        raise ValueError("not a formula of known functions")


def _bits(text: str) -> Any:
    if not _BITS.fullmatch(text) or "**" in text:
        raise ValueError("not a formula of bits")
    return eval(text, {"__builtins__": {}})  # noqa: S307 - it has integers and operators alone

"""What a caller's schema or regular expression may do to the process that tries it: nothing."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from services.sampler.backends.constraints import tried


def too_costly(_: str) -> None:
    while True:
        pass


def too_deep(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrong(text: str) -> None:
    raise ValueError(f"no: {text}")


def silent(_: str) -> None:
    raise MemoryError


def leaves(_: str) -> None:
    sys.exit("left")


@pytest.mark.parametrize(
    ("compile_", "told"),
    [
        (str.upper, ""),
        (wrong, "no: abc"),
        (silent, "MemoryError"),
        (leaves, "left"),
        (too_deep, "cannot be compiled"),
        (too_costly, "too costly to compile: it takes more than 0.02 s"),
    ],
)
def test_whatever_compiling_does_ends_in_an_answer(compile_, told):
    assert tried(compile_, "abc", 0.02) == told


def test_of_a_long_reason_the_beginning_is_told():
    assert tried(wrong, "é" * 10**6, 5.0).startswith("no: éééé")

"""Code as a program: what it writes is compared here, where it does not run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.reward.sandbox import Limits, Outcome, Place, Program

if TYPE_CHECKING:
    from services.reward.functions.code.reference import Case


async def run_case(place: Place, code: str, case: Case, limits: Limits) -> str:
    """What went wrong; empty: nothing."""
    program = Program({"main.py": code.encode(errors="replace")})
    outcome = await place.run(program, stdin=case.stdin.encode(errors="replace"), limits=limits)
    if not outcome.is_well:
        return f"{outcome}{_last_line(outcome)}"
    found = _lines(outcome.stdout.decode(errors="replace"))
    wanted = _lines(case.stdout)
    if found == wanted:
        return ""
    number = next(
        (
            index
            for index, pair in enumerate(zip(found, wanted, strict=False))
            if pair[0] != pair[1]
        ),
        min(len(found), len(wanted)),
    )
    return f"line {number + 1} is {_line(found, number)}, not {_line(wanted, number)}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _line(lines: list[str], number: int) -> str:
    return repr(lines[number][:100]) if number < len(lines) else "missing"


def _last_line(outcome: Outcome) -> str:
    lines = outcome.stderr.decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:200]}" if lines else ""

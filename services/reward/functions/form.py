"""Rewards for the form of a text, whatever it says: tags, repetition, script."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from rollmesh.chat import Scored
from rollmesh.config import Config

if TYPE_CHECKING:
    from rollmesh.types import ScoreItem

Tag = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$")]
# The words that Unicode's names of their letters begin with.
ScriptName = Literal[
    "arabic", "armenian", "bengali", "cjk", "cyrillic", "devanagari", "ethiopic", "georgian",
    "greek", "hangul", "hebrew", "hiragana", "katakana", "latin", "tamil", "telugu", "thai",
]  # fmt: skip


class FormatMatch(Config):
    """Parameters of format_match."""

    tags: Annotated[tuple[Tag, ...], Field(min_length=1, max_length=16)] = ("think", "answer")
    """The sections, each once and in this order, as `<think>…</think>`."""
    only: bool = True
    """Whether nothing but white space may stand before, between and after them."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.tags)) != len(self.tags):
            raise ValueError("tags: each once")
        return self


def format_match(item: ScoreItem, parameters: FormatMatch) -> Scored:
    """1 where the completion has the given sections, each once and in order; else 0.

    A section stands between a tag and its end, as in `<think>…</think><answer>…</answer>`. No tag
    of any of them stands in another one. The reference is not read.
    """
    text, position = item.completion, 0
    for tag in parameters.tags:
        for mark in (f"<{tag}>", f"</{tag}>"):
            if text.count(mark) != 1:
                return Scored(0.0, feedback=f"{mark} is there {text.count(mark)} times")
            found = text.find(mark, position)
            if found < 0:
                return Scored(0.0, feedback=f"{mark} comes too early")
            between = text[position:found]
            if parameters.only and not mark.startswith("</") and between.strip():
                return Scored(0.0, feedback=f"text before {mark}")
            position = found + len(mark)
    if parameters.only and text[position:].strip():
        return Scored(0.0, feedback="text after the last section")
    return Scored(1.0)


class Repetition(Config):
    """Parameters of repetition."""

    size: Annotated[PositiveInt, Field(le=64)] = 4
    """Words in a row that are compared."""


def repetition(item: ScoreItem, parameters: Repetition) -> float:
    """The share of the completion's word sequences that it has more than once, in [0, 1].

    A penalty: give it a negative weight in `weighted`. Words are what white space parts; sequences
    overlap. A completion shorter than one sequence repeats nothing. The reference is not read.
    """
    words = item.completion.split()
    count = len(words) - parameters.size + 1
    if count < 2:
        return 0.0
    different = {tuple(words[start : start + parameters.size]) for start in range(count)}
    return 1.0 - len(different) / count


class Script(Config):
    """Parameters of script."""

    scripts: Annotated[tuple[ScriptName, ...], Field(min_length=1, max_length=16)]
    """The scripts, as Unicode calls them; `cjk` is Han."""


def script(item: ScoreItem, parameters: Script) -> float:
    """The share of the completion's letters that are of the given scripts, in [0, 1].

    Where it has no letters: 1. The reference is not read.
    """
    wanted = {name.upper() for name in parameters.scripts}
    letters = [letter for letter in item.completion if letter.isalpha()]
    if not letters:
        return 1.0
    return sum(_script(letter) in wanted for letter in letters) / len(letters)


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]

"""Ids of the wire, and the names of the mesh that stand behind them.

A session's id is `s` and 16 hexadecimal digits. Everything else is derived from it by the numbers
that the SDK counts, so that whichever gateway a request reaches, it means the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rollmesh.errors import InvalidRequest
from rollmesh.names import adapter_name

_SESSION = r"s[0-9a-f]{16}"
_NUMBER = r"0|[1-9][0-9]{0,8}"
_MODEL = re.compile(rf"({_SESSION}):train:({_NUMBER})")
_SAMPLER = re.compile(rf"({_SESSION}):sample:(?:({_NUMBER})|m({_NUMBER})-([1-9][0-9]{{0,9}}))")
CLONE = 10**9
"""Of a sampling session's seq_ids so many belong to one clone of its client."""
MAX_NUMBER = 10**9 - 1
MAX_SEQ = 2**31 - 1
"""Of a model's requests: int32 in forward_backward's body."""


def session_id(text: str, *, field: str = "session_id") -> str:
    """`text`, which must be a session's id."""
    if not re.fullmatch(_SESSION, text):
        raise _malformed(text, field, "s and 16 hexadecimal digits")
    return text


@dataclass(frozen=True, slots=True)
class ModelId:
    """`{session}:train:{number}`: a training run."""

    session: str
    number: int

    def __str__(self) -> str:
        return f"{self.session}:train:{self.number}"

    @classmethod
    def parse(cls, text: str, *, field: str = "model_id") -> ModelId:
        """What `text` says."""
        match = _MODEL.fullmatch(text)
        if match is None:
            raise _malformed(text, field, "SESSION:train:NUMBER")
        return cls(match[1], int(match[2]))

    @property
    def queue(self) -> str:
        """Id of its order of futures, and of its adapter."""
        return f"{self.session}-{self.number}"

    def adapter(self, project: str) -> str:
        """Its adapter; `project` is a resource name."""
        return adapter_name(project.removeprefix("projects/"), self.queue)


@dataclass(frozen=True, slots=True)
class SamplerId:
    """A sampling session: `{session}:sample:{number}`, or of an unnamed save `…:m{model}-{seq}`.

    `save_seq` 0: it is of no unnamed save; else `number` is the model's.
    """

    session: str
    number: int
    save_seq: int = 0

    def __str__(self) -> str:
        slot = f"m{self.number}-{self.save_seq}" if self.save_seq else str(self.number)
        return f"{self.session}:sample:{slot}"

    @classmethod
    def parse(cls, text: str, *, field: str = "sampling_session_id") -> SamplerId:
        """What `text` says."""
        match = _SAMPLER.fullmatch(text)
        if match is None:
            raise _malformed(text, field, "the id of a sampling session")
        if match[2] is not None:
            return cls(match[1], int(match[2]))
        return cls(match[1], int(match[3]), int(match[4]))

    def group(self, clone: int) -> str:
        """Id of the group of futures of one of its clients."""
        return f"g-{self.session}-{base36(self.number)}-{base36(self.save_seq)}-{base36(clone)}"


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def base36(number: int) -> str:
    """`number` ≥ 0 in [0-9a-z]."""
    text = ""
    while number >= 36:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
    return _DIGITS[number] + text


def _malformed(text: str, field: str, form: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {text[:100]!r} is not {form}", field=field, value=text[:100], allowed=form
    )

"""Token ids to text piece by piece: the pieces together are what the whole would have been."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_PATIENCE = 16
"""Tokens that may wait for the rest of a character. It has four bytes at most: what is not whole by
then never will be, and all that waits is decoded anew with each token."""


class Decoder(Protocol):
    """`rollmesh.tokenizer.ModelTokenizer` is one."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text, without special tokens or with them."""
        ...


class TextStream:
    """The text of one completion. `hidden`: tokens that are no text, as those that end a turn."""

    def __init__(self, decoder: Decoder, hidden: Container[int]) -> None:
        self._decoder = decoder
        self._hidden = hidden
        # What a token reads as depends on the one before it: pieces that were told stay in sight.
        self._told: list[int] = []
        self._new: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """What these tokens add; the beginning of a character waits for its end."""
        text = ""
        for token_id in token_ids:
            if token_id in self._hidden:
                continue
            self._new.append(token_id)
            piece = self._piece()
            if piece and (not piece.endswith(_UNFINISHED) or len(self._new) >= _PATIENCE):
                text += self._tell(piece)
        return text

    def rest(self) -> str:
        """What waits for an end that does not come."""
        return self._tell(self._piece())

    def _piece(self) -> str:
        before = self._decoder.decode(self._told, skip_special_tokens=False)
        both = self._decoder.decode([*self._told, *self._new], skip_special_tokens=False)
        return both[len(before) :]

    def _tell(self, piece: str) -> str:
        self._told, self._new = self._new or self._told, []
        return piece


class StopCutter:
    """Text up to the first of `stops`; what may be the beginning of one waits.

    `keep`: the stop itself is told too.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self._stops = stops
        self._keep = keep
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be told now."""
        if self.stopped:
            return ""
        self._held += text
        # That which is whole first, however the text comes.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, at = min(found)
            self.stopped = True
            return self._held[: end if self._keep else at]
        waiting = max((beginning(self._held, stop) for stop in self._stops), default=0)
        told, self._held = _split(self._held, waiting)
        return told

    def rest(self) -> str:
        """What waits for the rest of a stop that does not come."""
        told, self._held = ("", "") if self.stopped else (self._held, "")
        return told


def beginning(text: str, whole: str) -> int:
    """How many characters at the end of `text` may be the beginning of `whole`."""
    most = min(len(text), len(whole) - 1)
    return next((size for size in range(most, 0, -1) if whole.startswith(text[-size:])), 0)


def _split(text: str, size: int) -> tuple[str, str]:
    return text[: len(text) - size], text[len(text) - size :]

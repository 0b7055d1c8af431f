"""age encryption of exported files, where pyrage is installed."""

from __future__ import annotations

import importlib.util
import tempfile
from typing import IO, TYPE_CHECKING, Any, Self

from rollmesh.errors import InvalidRequest, Unimplemented

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SUFFIX = ".age"
_IN_MEMORY = 8 * 2**20


def check_recipients(recipients: Sequence[str]) -> None:
    """Refuse what cannot be encrypted to.

    Raises:
        InvalidRequest: one is no age or SSH public key.
        Unimplemented: there are some, and pyrage is not installed.
    """
    if recipients:
        _recipients(recipients)


def _recipients(recipients: Sequence[str]) -> list[Any]:
    if importlib.util.find_spec("pyrage") is None:
        raise Unimplemented("age_encryption_recipients: this gateway has no pyrage, which it needs")
    from pyrage import RecipientError, ssh, x25519  # noqa: PLC0415 - not installed everywhere

    found = []
    for index, text in enumerate(recipients):
        kind = ssh if text.startswith("ssh-") else x25519
        try:
            found.append(kind.Recipient.from_str(text))
        except RecipientError as error:
            field = f"age_encryption_recipients[{index}]"
            raise InvalidRequest(f"{field}: {error}", field=field, value=text[:100]) from None
    return found


class Encrypted:
    """A file that is written in pieces, then encrypted; it is gone with the block."""

    def __init__(self, recipients: Sequence[str]) -> None:
        self._recipients = _recipients(recipients)
        self._plain = _temporary()
        self._sealed = _temporary()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._plain.close()
        self._sealed.close()

    def write(self, piece: bytes) -> None:
        """The next piece."""
        self._plain.write(piece)

    def seal(self) -> int:
        """Encrypt what was written: how many bytes it became. Blocks."""
        import pyrage  # noqa: PLC0415 - not installed everywhere

        self._plain.seek(0)
        pyrage.encrypt_io(self._plain, self._sealed, self._recipients)
        size = self._sealed.tell()
        self._sealed.seek(0)
        return size

    def pieces(self, size: int) -> Iterable[bytes]:
        """What it became, in pieces of `size` bytes. Blocks."""
        while piece := self._sealed.read(size):
            yield piece


def _temporary() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(_IN_MEMORY)

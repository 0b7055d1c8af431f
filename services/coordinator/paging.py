"""Pages of lists."""

from __future__ import annotations

from rollmesh.errors import InvalidRequest

_DEFAULT, _MAX = 100, 1000


def page_size_of(asked: int) -> int:
    """Resources of one page; 0 asks for the default.

    Raises:
        InvalidRequest: out of range.
    """
    if not 0 <= asked <= _MAX:
        raise InvalidRequest(
            f"page_size: {asked} is not in [1, {_MAX}]",
            field="page_size",
            value=asked,
            allowed=f"1 to {_MAX}",
        )
    return asked or _DEFAULT

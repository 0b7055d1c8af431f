"""How long things are kept that somebody gave a time to live."""

from __future__ import annotations

from rollmesh.errors import InvalidRequest

USE_NOTED_EVERY_S = 60.0
"""An adapter's use_time may be so much earlier than its use: it lives for so much longer."""

_MAX_S = 100 * 365 * 86400.0


def check_ttl(seconds: float | None, *, field: str) -> float | None:
    """`seconds`, which must be over 0 and at most 100 years; None: for ever.

    The bound keeps the moment of its end a time that a Timestamp can say.

    Raises:
        InvalidRequest: out of range, naming `field`.
    """
    if seconds is not None and not 0 < seconds <= _MAX_S:
        raise InvalidRequest(
            f"{field}: {seconds:g} s is not over 0 and at most 100 years",
            field=field,
            value=seconds,
            allowed=f"over 0 s, at most {_MAX_S:g} s",
        )
    return seconds

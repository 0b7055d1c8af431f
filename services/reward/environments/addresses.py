"""Where names lead."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from rollmesh.errors import Unavailable

if TYPE_CHECKING:
    from types import TracebackType

NUM_THREADS = 4
"""Of our own: a name server that is away takes seconds to find out, and only names wait for it."""


class Resolver:
    """Looks up the IP addresses behind names."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="resolver")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, address: str) -> list[str]:
        """Every IP:port behind `address` (host:port), those of IPv4 if there are any, sorted.

        Raises:
            Unavailable: the name leads nowhere.
        """
        host, _, port = address.rpartition(":")
        if _is_number(host.strip("[]")):
            return [address]
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )
        except OSError as error:
            raise Unavailable(f"the name leads nowhere: {error.strerror or error}") from None
        places = {family: set[str]() for family in (socket.AF_INET, socket.AF_INET6)}
        for family, _, _, _, where in found:
            places[family].add(str(where[0]))
        numbers = sorted(places[socket.AF_INET])
        return [f"{number}:{port}" for number in numbers] or [
            f"[{number}]:{port}" for number in sorted(places[socket.AF_INET6])
        ]


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

"""A process whose environment keeps something of each episode: `nothing`, `memory` or `files`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.fakes.environments import Parrot, served


class Leaking(Parrot):
    def __init__(self, what):
        super().__init__()
        self.leaked = []
        self.keep = {
            "nothing": lambda: None,
            "memory": lambda: b"x" * 500_000,
            "files": Path("/dev/null").open,
        }[what]

    async def played(self, start, requests, context):
        self.leaked.append(self.keep())
        async for response in super().played(start, requests, context):
            yield response


async def main():
    async with served(Leaking(sys.argv[1])) as port:
        print(port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())

"""The reward service with a second of latency, as one that asks a model or runs tests has.

`python -m benchmarks.slow_reward --config FILE`, in place of services.reward.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rollmesh.config import from_command_line, run
from services.reward.__main__ import serve
from services.reward.config import RewardConfig
from services.reward.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rollmesh.types import ScoreItem

LATENCY_S = 1.0


class SlowRegistry(Registry):
    """Answers as late as it is asked, whatever else it does meanwhile."""

    async def score(
        self, name: str, parameters: Mapping[str, Any], items: Sequence[ScoreItem]
    ) -> list[float]:
        """The rewards of `items`, LATENCY_S later."""
        rewards, _ = await asyncio.gather(
            super().score(name, parameters, items), asyncio.sleep(LATENCY_S)
        )
        return rewards


def main() -> None:
    """Serve until told to end."""
    config = from_command_line(RewardConfig, "benchmarks.slow_reward")
    run(serve(config, SlowRegistry))


if __name__ == "__main__":
    main()

"""The environment of benchmarks/environments.py: counts what is open, and waits where it is told.

An episode asks twice and then is over. A single turn is worth the last letter's place; of task
`open` it is worth the number of episodes that are open.
"""

from __future__ import annotations

from rollmesh.environment import Environment, Episode, Task, serve

NUM_TASKS = 1024
OPEN = "open"
MAX_EPISODES = 20_000

num_open = 0

world = Environment(
    "world",
    version="1",
    description="Two turns, or one.",
    tasks={"train": [f"task {number}" for number in range(NUM_TASKS)], "count": [OPEN]},
    deterministic=True,
    max_concurrent_episodes=MAX_EPISODES,
)


@world.score
async def score(task: Task, answer: str) -> float:
    """Of the one task that counts what is open."""
    if task.fields.get("what") == OPEN:
        return float(num_open)
    return float(ord(answer[-1]) % 10) if answer else 0.0


@world.episode(max_turns=4)
async def play(episode: Episode) -> float:
    """Two turns."""
    global num_open  # noqa: PLW0603 - a process has one world
    num_open += 1
    try:
        await episode.ask("first?")
        await episode.ask("second?")
    finally:
        num_open -= 1
    return 1.0


if __name__ == "__main__":
    serve(world)

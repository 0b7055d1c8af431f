"""Add two numbers, with a calculator at hand: an episode of several turns, with a tool."""

import random
import re

from rollmesh.environment import Environment, Episode, serve, task_of

NUM_TRAIN, NUM_HELDOUT = 4_096, 256
pairs = random.Random(0).sample(range(10_000), NUM_TRAIN + NUM_HELDOUT)
tasks = [task_of(f"{n // 100}+{n % 100}", answer=str(n // 100 + n % 100)) for n in pairs]

environment = Environment(
    "calculator",
    version="1",
    description="The user says a sum; the assistant may call the calculator, then says what it is.",
    tasks={"train": tasks[:NUM_TRAIN], "heldout": tasks[NUM_TRAIN:]},
    deterministic=True,
)


@environment.tool
def calculator(expression: str) -> int:
    """Adds and subtracts whole numbers, e.g. 37+58."""
    if not re.fullmatch(r"-?[0-9]{1,9}(?:[+-][0-9]{1,9}){0,9}", expression):
        raise ValueError("not a sum")
    return sum(map(int, re.findall(r"[+-]?[0-9]+", expression)))


@environment.episode(max_turns=4)
async def play(episode: Episode) -> float:
    action = await episode.ask(episode.task.messages)
    while action.tool_calls:
        action = await episode.ask(await episode.call_tools(action))
    return float(action.content.strip() == episode.task.fields["answer"])


if __name__ == "__main__":
    serve(environment)

"""A game of `verifiers` that speaks for the user: higher or lower, until the number is said."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["GuessEnv", "Guesses"]


class NumberData(vf.TaskData):
    number: int


class Number(vf.Task[NumberData]):
    pass


class Guesses(vf.Taskset[Number, vf.TasksetConfig]):
    def load(self):
        for number in (3, 7):
            yield Number(NumberData(number=number))


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        guesses = 0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn("1-9?")
            while not segment.terminated:
                guesses += 1
                guess = segment.last_reply
                if guess == str(task.data.number):
                    break
                low = guess.isdigit() and int(guess) < task.data.number
                segment = await interaction.turn("higher" if low else "lower")
        interaction.trace.record_reward("quick", 1 / guesses)

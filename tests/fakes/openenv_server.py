"""A real OpenEnv server with a small game: spell the word that it thinks of, letter by letter."""

from __future__ import annotations

import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from openenv.core.env_server.types import ConcurrencyConfig

WORDS = ("cat", "dog")


class Letter(Action):
    letter: str


class Seen(Observation):
    text: str


class Spelling(Environment[Letter, Seen, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **options):
        self.word = WORDS[(seed or 0) % len(WORDS)]
        self.place = 0
        return Seen(text=f"{len(self.word)} letters")

    def step(self, action, timeout_s=None, **options):
        right = action.letter == self.word[self.place]
        self.place += right
        done = self.place == len(self.word)
        return Seen(text=self.word[: self.place], reward=float(right), done=done)

    @property
    def state(self):
        return State()


if __name__ == "__main__":
    app = create_app(
        Spelling,
        Letter,
        Seen,
        env_name="spelling",
        concurrency_config=ConcurrencyConfig(max_concurrent_envs=64),
    )
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")

"""A taskset of `verifiers` with a tool, which is a process of each episode."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["Lookups"]


class Book(vf.Toolset[vf.ToolsetConfig, vf.State]):
    @vf.tool
    async def look_up(self, word: str) -> str:
        """What a word means."""
        return f"{word} means {word[::-1]}"


class LookupData(vf.TaskData):
    answer: str


class Lookup(vf.Task[LookupData]):
    @classmethod
    def toolsets(cls, config):
        return [Book(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == task.answer)


class Lookups(vf.Taskset[Lookup, vf.TasksetConfig]):
    def load(self):
        for word in ("abc", "xyz"):
            yield Lookup(LookupData(prompt=f"What does {word} mean?", answer=word[::-1]))


if __name__ == "__main__":
    Book.run()

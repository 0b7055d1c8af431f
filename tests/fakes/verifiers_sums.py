"""A taskset of `verifiers`: sums, of one answer."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["Sums"]


class SumData(vf.TaskData):
    answer: str


class Sum(vf.Task[SumData]):
    @vf.reward(weight=1.0)
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == task.answer)

    @vf.reward(weight=0.5)
    async def short(self, task, trace) -> float:
        return float(len(trace.last_reply) <= 3)

    @vf.metric
    async def length(self, task, trace) -> float:
        return float(len(trace.last_reply))


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self):
        for n in range(30):
            yield Sum(
                SumData(system_prompt="Add.", prompt=f"{n}+{n}", answer=str(2 * n)),
                self.config.task,
            )

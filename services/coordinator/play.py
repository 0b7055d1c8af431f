"""What a job's loop needs besides the job: its tasks, its tokenizer, and the mesh."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.coordinator import loop
from services.coordinator.retry import Patience
from services.coordinator.tasks import Taskmaster, environment_of

if TYPE_CHECKING:
    from services.coordinator.border import Outcome
    from services.coordinator.makers import Peers
    from services.coordinator.ports import JobContext, Recorder
    from services.coordinator.runner import Play


def playing(peers: Peers) -> Play:
    """The loop on this mesh."""
    taskmaster = Taskmaster(peers.environments)

    async def play(context: JobContext, recorder: Recorder) -> Outcome:
        spec = context.spec
        patience = Patience("reward", recorder.record, context.problems)
        return await loop.run(
            context,
            peers,
            loop.Tasks(
                await patience.call(lambda: taskmaster.training(spec)),
                await patience.call(lambda: taskmaster.evaluation(spec)),
                await patience.call(lambda: environment_of(spec, peers.reward, peers.environments)),
            ),
            tokenizer=await asyncio.to_thread(peers.load_tokenizer, spec.base_model),
            recorder=recorder,
        )

    return play

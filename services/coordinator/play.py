"""What a job's loop needs besides the job: its tasks, its tokenizer, and the mesh."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.coordinator import loop
from services.coordinator.tasks import evaluation_tasks, training_tasks

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.coordinator.border import Outcome
    from services.coordinator.ports import (
        Checkpointing,
        JobContext,
        Recorder,
        RewardPort,
        Sampling,
        Tokenizer,
        Training,
    )
    from services.coordinator.runner import Play


def playing(
    training: Training,
    sampling: Sampling,
    reward: RewardPort,
    checkpoints: Checkpointing,
    load_tokenizer: Callable[[str], Tokenizer],
) -> Play:
    """The loop on this mesh; `load_tokenizer` reads that of a base model and may block."""
    tokenizers: dict[str, Tokenizer] = {}  # one for each base model that a job ever asked for

    async def play(context: JobContext, recorder: Recorder) -> Outcome:
        spec = context.spec
        if spec.base_model not in tokenizers:
            tokenizers[spec.base_model] = await asyncio.to_thread(load_tokenizer, spec.base_model)
        return await loop.run(
            context,
            training=training,
            sampling=sampling,
            reward=reward,
            checkpoints=checkpoints,
            tokenizer=tokenizers[spec.base_model],
            recorder=recorder,
            tasks=await asyncio.to_thread(training_tasks, spec),
            evaluation_tasks=await asyncio.to_thread(evaluation_tasks, spec),
        )

    return play

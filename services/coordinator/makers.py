"""What makes the rollouts of a job, by what its spec says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rollmesh.job import EnvironmentSpec
from services.coordinator.episodes import Episodes
from services.coordinator.judge import Judge
from services.coordinator.retry import Outage, Patience
from services.coordinator.rollouts import Rollouts
from services.coordinator.scoring import EnvironmentScorer, FunctionScorer, NoReward
from services.coordinator.tolerance import Tolerance

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from rollmesh import chat
    from rollmesh.job import Warned
    from services.coordinator.draws import Draws
    from services.coordinator.ports import (
        Checkpointing,
        EnvironmentPort,
        JobContext,
        RewardPort,
        RolloutMaker,
        Sampling,
        Tokenizer,
        Training,
    )
    from services.coordinator.scoring import Scorer


@dataclass(frozen=True, slots=True)
class Peers:
    """Whom the loop of a job asks. `load_tokenizer`: that of a base model; may block."""

    training: Training
    sampling: Sampling
    reward: RewardPort
    environments: EnvironmentPort
    checkpoints: Checkpointing
    load_tokenizer: Callable[[str], Tokenizer]


@dataclass(frozen=True, slots=True)
class Making:
    """What makes rollouts. `tolerance` None: there is no environment that could fail."""

    maker: RolloutMaker
    tolerance: Tolerance | None


def making(
    context: JobContext,
    peers: Peers,
    info: chat.EnvironmentInfo | None,
    *,
    tokenizer: Tokenizer,
    draws: Draws,
    outage: Outage,
    warn: Callable[[Warned], Awaitable[None]],
) -> Making:
    """For the job of `context`; `info` is what its environment says of itself, if it has one.

    `outage` is of the samplers, `warn` records an event.
    """
    spec = context.spec
    patience = Patience("reward", warn, context.problems)
    of_environment = spec.environment
    if spec.reward is not None and spec.reward.environment:
        of_environment = EnvironmentSpec(name=spec.reward.environment)
    tolerance = None
    if of_environment is not None:
        memory: Mapping[str, Any] = context.memory.get("tolerance", {})
        tolerance = Tolerance(of_environment, patience=patience, warn=warn, memory=memory)
    if info is not None and info.has_episodes:
        assert tolerance is not None  # noqa: S101 - who has info has an environment
        episodes = Episodes(
            spec,
            info,
            environments=peers.environments,
            draws=draws,
            tolerance=tolerance,
            tokenizer=tokenizer,
        )
        return Making(episodes, tolerance)
    scorer: Scorer = NoReward()
    if of_environment is not None and tolerance is not None:
        scorer = EnvironmentScorer(
            of_environment.name,
            environments=peers.environments,
            prompt=spec.prompt,
            tolerance=tolerance,
            tokenizer=tokenizer,
        )
    elif spec.reward is not None:
        judge = Judge(
            spec,
            context.name,
            training=peers.training,
            sampling=peers.sampling,
            outage=outage,
            patience=Patience("trainer", warn, context.problems),
            load_tokenizer=peers.load_tokenizer,
        )
        scorer = FunctionScorer(
            spec.reward,
            reward=peers.reward,
            patience=patience,
            judge=judge.answer,
            tokenizer=tokenizer,
        )
    rollouts = Rollouts(spec, draws=draws, scorer=scorer, tokenizer=tokenizer)
    return Making(rollouts, tolerance)

"""A modelled job that runs: its step, its buffer, and the groups that it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from services.coordinator.buffer import RolloutBuffer

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from services.coordinator.groups import Group
    from services.coordinator.simulation.jobs import JobModel
    from services.coordinator.simulation.trace import Phase


@dataclass(frozen=True, slots=True)
class ModelledGroup:
    """What RolloutBuffer and the trainer need of a group."""

    number: int
    policy_version: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class RunningModel:
    """`kept`: its finished groups that are not trained yet, as in the store.

    `recovered`: whether the coordinator began anew while its step was trained.
    """

    model: JobModel
    step: int = 0
    kept: dict[int, ModelledGroup] = field(default_factory=dict)
    training: bool = False
    step_began: float = 0.0
    buffer: RolloutBuffer = field(init=False)
    phase: Phase = "sample"
    since: float = 0.0
    num_sampling: int = 0
    recovered: bool = False

    def __post_init__(self) -> None:
        self.recover()

    def recover(self) -> None:
        """Begin anew at its step."""
        self.num_sampling = 0
        self.recovered = False
        self.buffer = RolloutBuffer(
            groups_per_step=self.model.groups_per_step,
            max_staleness=self.model.max_staleness,
            first_step=self.step,
            last_step=self.model.steps,
        )

    def missing(self) -> list[int]:
        """Groups that may be begun, and are not kept from before."""
        admitted = self.buffer.admit()
        for number in admitted:
            if number in self.kept:
                self.put(self.kept[number])
        return list(self.buffer.missing(admitted))

    def put(self, group: ModelledGroup) -> None:
        """It is scored."""
        self.kept[group.number] = group
        self.buffer.put(cast("Group", group))

    def is_ready(self) -> bool:
        """Whether all groups of its next step are there."""
        per_step = self.model.groups_per_step
        return not self.buffer.missing(range(self.step * per_step, (self.step + 1) * per_step))

    def take(self) -> list[ModelledGroup]:
        """They, once it is ready."""
        taken = _now(self.buffer.take(self.model.groups_per_step))
        return cast("list[ModelledGroup]", taken)

    def trained(self, groups: list[ModelledGroup]) -> None:
        """Its step on `groups` is done."""
        for group in groups:
            del self.kept[group.number]
        self.training = False
        self.step += 1
        if self.recovered:
            self.recover()
        else:
            self.buffer.release(len(groups))


def _now(taken: Coroutine[None, None, list[Group]]) -> list[Group]:
    """The result of what has nothing to wait for."""
    try:
        taken.send(None)
    except StopIteration as over:
        return cast("list[Group]", over.value)
    raise AssertionError("the groups of the step are not there")

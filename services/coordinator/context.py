"""What the loop of one job sees of the store: what it goes on from, and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rollmesh.job import EvaluationCompleted, Happening, JobSpec
    from services.coordinator.ports import Problems
    from services.coordinator.store import GroupStore, JobStore, StoredJob


@dataclass(frozen=True)
class Context:
    """A ports.JobContext."""

    _stored: StoredJob
    _groups: GroupStore
    adapter: str
    pause_requested: Callable[[], bool]
    problems: Problems

    @property
    def name(self) -> str:
        """Resource name of the job."""
        return self._stored.job.name

    @property
    def spec(self) -> JobSpec:
        """With all tasks."""
        return self._stored.spec

    @property
    def step(self) -> int:
        """Optimizer steps recorded as finished."""
        return self._stored.job.step

    @property
    def last_evaluation_step(self) -> int | None:
        """Step of the newest evaluation recorded."""
        evaluation = self._stored.job.last_evaluation
        return None if evaluation is None else evaluation.step

    @property
    def best_evaluation(self) -> EvaluationCompleted | None:
        """The best one recorded."""
        return self._stored.job.best_evaluation

    @property
    def memory(self) -> Mapping[str, Any]:
        """What was recorded with the newest event that brought any."""
        return self._stored.memory

    @property
    def hold_step(self) -> int | None:
        """The step at which to wait for the other jobs of its sweep."""
        return self._stored.hold_step

    async def kept_groups(self) -> Mapping[int, bytes]:
        """The finished groups, by number, that are kept and not trained yet."""
        return await self._groups.waiting(self.name)


@dataclass(frozen=True)
class StoreRecorder:
    """A ports.Recorder."""

    _store: JobStore
    _groups: GroupStore
    _job: str
    _clock: Callable[[], float]
    _note_pausing: Callable[[bool], None]

    async def record(
        self, happening: Happening, *, memory: Mapping[str, Any] | None = None
    ) -> None:
        """Store the next event of the job, and take note of whether it is to pause."""
        pausing = await self._store.record(self._job, happening, memory=memory, now=self._clock())
        self._note_pausing(pausing)

    async def keep(self, number: int, group: bytes) -> None:
        """Store a finished group of the job."""
        await self._groups.keep(self._job, number, group, now=self._clock())

"""What is done between two steps of a job: it may pause, is measured, and may have ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rollmesh.errors import MeshError, NotFound
from rollmesh.job import Warned
from rollmesh.names import checkpoint_name
from services.coordinator.evaluation import evaluate, is_better, is_due
from services.coordinator.store import derived_request_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from rollmesh import types
    from rollmesh.job import Happening
    from services.coordinator.datasets import Task
    from services.coordinator.ports import Checkpointing, JobContext, RolloutMaker

MAIN = ""
"""Name of the set that `evaluation.dataset` is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a loop ended without an error. `held`: at a step where the jobs of its sweep meet."""

    kind: Literal["finished", "paused", "held"]
    reason: str


class Record(Protocol):
    """Writes the next event."""

    async def __call__(
        self, happening: Happening, *, border: Mapping[str, Any] | None = None
    ) -> None:
        """With what Border is to remember from then on; None: what it remembers."""
        ...


@dataclass(frozen=True)
class _Known:
    """What a successor has to know: JSON.

    `evaluated`: the step of each set's newest evaluation. `reward`: of the main set's newest.
    `since_best`: the main set's evaluations since the best. `checkpoint`: with the best weights;
    empty: there is none, and `lesser` is that of the best before, as the best could not be kept.
    `superseded`: one that is to be deleted.
    """

    evaluated: Mapping[str, int] = field(default_factory=dict)
    reward: float | None = None
    since_best: int = 0
    checkpoint: str = ""
    lesser: str = ""
    superseded: str = ""


class Border:
    """The borders between the steps of one job.

    Args:
        context: what is known of the job.
        maker: draws and scores what is evaluated.
        checkpoints: where the best weights are kept.
        tasks: of each evaluation set, by its name.
        record: writes events.
        call: of the trainer or the store; repeats it while they are away.
    """

    def __init__(
        self,
        context: JobContext,
        maker: RolloutMaker,
        checkpoints: Checkpointing,
        tasks: Mapping[str, Sequence[Task]],
        *,
        record: Record,
        call: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
    ) -> None:
        self._context = context
        self._spec = context.spec
        self._maker = maker
        self._checkpoints = checkpoints
        self._tasks = tasks
        self._record = record
        self._call = call
        self._best = context.best_evaluation
        # The border at which this loop began: the one before may have died there.
        self._first: int | None = None
        self._known = _Known(**context.memory.get("border", {}))
        if MAIN not in self._known.evaluated and context.last_evaluation_step is not None:
            # A job from before this was remembered.
            evaluated = {**self._known.evaluated, MAIN: context.last_evaluation_step}
            self._known = replace(self._known, evaluated=evaluated)

    @property
    def memory(self) -> dict[str, Any]:
        """What is true now and has to be known to go on: JSON."""
        return asdict(self._known)

    async def outcome(self, step: int, source: types.AdapterSource) -> Outcome | None:
        """Do what is due when `step` steps are finished; how the job ended, None: it goes on.

        `source` is the version after `step` steps, which is live.
        """
        if self._context.pause_requested():
            return Outcome("paused", f"paused after step {step}")
        await self._drop_superseded()
        if self._first is None:
            self._first = step
            await self._keep_after_all(step)
        if is_due(self._spec, step):
            # The main set last: what is decided by it is decided when all have been measured.
            for name in sorted(self._tasks, reverse=True):
                if self._known.evaluated.get(name) != step:
                    await self._evaluate(name, step, source)
        return self._end(step)

    def _end(self, step: int) -> Outcome | None:
        stop, known = self._spec.stop, self._known
        target = stop.evaluation_reward
        if target is not None and known.reward is not None and known.reward >= target:
            return Outcome(
                "finished",
                f"evaluation reward {known.reward:g} after step {known.evaluated[MAIN]} reached "
                f"stop.evaluation_reward {target:g}",
            )
        if step >= stop.max_steps:
            return Outcome("finished", f"all {stop.max_steps} steps are done")
        if stop.patience is not None and self._best and known.since_best >= stop.patience:
            return Outcome(
                "finished",
                f"{known.since_best} evaluations in a row were no better than "
                f"{self._best.reward_mean:g} after step {self._best.step}, as many as "
                "stop.patience says",
            )
        hold = self._context.hold_step
        if hold is not None and step >= hold:
            return Outcome("held", f"waits at step {step} for the other jobs of its sweep")
        return None

    async def _evaluate(self, name: str, step: int, source: types.AdapterSource) -> None:
        evaluation = await evaluate(self._tasks[name], source, self._maker, step=step, name=name)
        before = self._known
        after = replace(before, evaluated={**before.evaluated, name: step})
        best = self._best
        if name == MAIN:
            after = replace(after, reward=evaluation.reward_mean, since_best=before.since_best + 1)
            if is_better(evaluation, best, self._spec.stop.min_improvement):
                best = evaluation
                checkpoint = await self._kept_best(step)
                after = replace(_with(after, checkpoint), since_best=0)
            elif step == self._first:
                # It was better, and its weights were kept, when the loop before measured the same
                # and died: nobody else knows of them.
                await self._drop(self._checkpoint_of(step))
        # Written with the event, and true only then: others may write theirs in between.
        await self._record(evaluation, border=asdict(after))
        self._known, self._best = after, best
        await self._drop_superseded()

    async def _kept_best(self, step: int) -> str:
        """The checkpoint with the weights as they are; empty where that fails, or nobody asks."""
        if not self._keeps_best:
            return ""
        name = self._checkpoint_of(step)
        request_id = derived_request_id(self._context.name, "best", step)
        try:
            await self._call(
                lambda: self._checkpoints.create_checkpoint(name, ttl_s=None, request_id=request_id)
            )
        except MeshError as error:
            await self._warn(
                f"the best weights, after step {step}, could not be kept, and are no more from the "
                f"next step on; there is no best_checkpoint until an evaluation is better: {error}"
            )
            return ""
        return name

    async def _keep_after_all(self, step: int) -> None:
        """Keep the best weights where that failed, as long as the adapter has them."""
        missing = self._keeps_best and not self._known.checkpoint
        if not missing or self._best is None or self._best.step != step:
            return
        checkpoint = await self._kept_best(step)
        if checkpoint:
            after = _with(self._known, checkpoint)
            message = f"the best weights, after step {step}, are kept after all"
            await self._record(
                Warned(reason="CHECKPOINT_FAILED", message=message), border=asdict(after)
            )
            self._known = after
            await self._drop_superseded()

    @property
    def _keeps_best(self) -> bool:
        return self._spec.evaluation is not None and self._spec.evaluation.keep_best

    def _checkpoint_of(self, step: int) -> str:
        return checkpoint_name(self._context.adapter, f"best-{step}")

    async def _drop_superseded(self) -> None:
        if self._known.superseded:
            await self._drop(self._known.superseded)
            self._known = replace(self._known, superseded="")

    async def _drop(self, checkpoint: str) -> None:
        """Delete it, if there is one and the job keeps any."""
        if not self._keeps_best:
            return
        request_id = derived_request_id(self._context.name, "drop", checkpoint)
        try:
            await self._call(
                lambda: self._checkpoints.delete_checkpoint(checkpoint, request_id=request_id)
            )
        except NotFound:
            pass  # Its user was faster, or it was never made.
        except MeshError as error:
            # It stays and costs room: no reason to end a job.
            await self._warn(f"{checkpoint} could not be deleted: {error}")

    async def _warn(self, message: str) -> None:
        await self._record(Warned(reason="CHECKPOINT_FAILED", message=message))


def _with(known: _Known, checkpoint: str) -> _Known:
    """With the checkpoint of the best weights, empty if there is none, instead of that before."""
    before = known.checkpoint or known.lesser
    if not checkpoint:
        return replace(known, checkpoint="", lesser=before)
    return replace(known, checkpoint=checkpoint, lesser="", superseded=before)

"""The GRPO loop of one managed job: sample and score groups, train on them, publish, repeat."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from rollmesh import telemetry
from rollmesh.job import StepCompleted, Warned
from services.coordinator.agreement import Agreement, gap_metrics
from services.coordinator.batch import batch, teaching
from services.coordinator.buffer import RolloutBuffer
from services.coordinator.evaluation import evaluate, is_due
from services.coordinator.learner import Learner
from services.coordinator.metrics import Phases, of_groups, of_trainer
from services.coordinator.prompts import check_templates
from services.coordinator.retry import Outage, Patience
from services.coordinator.rollouts import Rollouts
from services.coordinator.versions import Versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rollmesh import types
    from rollmesh.job import Happening
    from services.coordinator.datasets import Task
    from services.coordinator.ports import (
        JobContext,
        Recorder,
        RewardPort,
        Sampling,
        Tokenizer,
        Training,
    )
    from services.coordinator.rollouts import Group


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a loop ended without an error."""

    kind: Literal["finished", "paused"]
    reason: str


async def run(
    context: JobContext,
    *,
    training: Training,
    sampling: Sampling,
    reward: RewardPort,
    tokenizer: Tokenizer,
    recorder: Recorder,
    tasks: Sequence[Task],
    evaluation_tasks: Sequence[Task],
) -> Outcome:
    """Run the job from where it is until its `stop`, or to the next border once pause is asked for.

    Raises:
        MeshError: what failed the job.
    """
    loop = _Loop(
        context,
        training=training,
        sampling=sampling,
        reward=reward,
        tokenizer=tokenizer,
        recorder=recorder,
        tasks=tasks,
        evaluation_tasks=evaluation_tasks,
    )
    with telemetry.log_fields(job=context.name, adapter=context.adapter):
        await asyncio.to_thread(check_templates, context.spec, [*tasks, *evaluation_tasks])
        try:
            return await loop.run()
        except BaseExceptionGroup as failures:
            # What failed first cancelled the rest: the job's failure is that one error.
            failure = _first(failures)
        finally:
            sampling.end_quarantines(context.name)
        # Out here, so that the error keeps its own cause.
        raise failure


class _Loop:
    def __init__(
        self,
        context: JobContext,
        *,
        training: Training,
        sampling: Sampling,
        reward: RewardPort,
        tokenizer: Tokenizer,
        recorder: Recorder,
        tasks: Sequence[Task],
        evaluation_tasks: Sequence[Task],
    ) -> None:
        self._context = context
        self._spec = context.spec
        self._recorder = recorder
        self._recording = asyncio.Lock()
        self._evaluation_tasks = evaluation_tasks
        self._evaluated_at = context.last_evaluation_step
        algorithm, step = context.spec.algorithm, context.step
        self._versions = Versions(
            before=range(max(0, step - algorithm.max_staleness - 1), step),
            continuing=context.spec.sampling.continue_on_newest,
        )
        self._learner = Learner(
            context,
            training=training,
            sampling=sampling,
            patience=Patience("trainer", self._record),
            versions=self._versions,
        )
        self._agreement = Agreement(
            context, learner=self._learner, sampling=sampling, warn=self._record
        )
        self._rollouts = Rollouts(
            context.spec,
            context.name,
            tasks,
            sampling=sampling,
            reward=reward,
            sampler_outage=Outage("sampler", self._record),
            reward_patience=Patience("reward", self._record),
            tokenizer=tokenizer,
            versions=self._versions,
        )

    async def run(self) -> Outcome:
        step = await self._recover(self._context.step)
        source = await self._learner.go_live(step, Phases())
        algorithm = self._spec.algorithm
        buffer = RolloutBuffer(
            groups_per_step=algorithm.groups_per_step,
            max_staleness=algorithm.max_staleness,
            first_step=step,
            last_step=self._spec.stop.max_steps,
        )
        under_way: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as tasks:
            while not (outcome := await self._border(step, source)):
                source = await self._step(step, source, buffer, tasks, under_way)
                step += 1
            # With max_staleness > 0 the next steps' groups are under way already.
            for task in under_way:
                task.cancel()
        return outcome

    async def _recover(self, step: int) -> int:
        """The number of finished steps, after finishing one that was interrupted in the middle."""
        progress = await self._learner.progress(step)
        if progress == "clean":
            return step
        metrics: Mapping[str, float] = {}
        phases = Phases()
        if progress == "gradients_pending":
            with phases.phase("optim_step"):
                metrics = of_trainer(await self._learner.optim_step(step))
        await self._learner.go_live(step + 1, phases)
        await self._record(
            Warned(
                reason="STEP_RECOVERED",
                message=f"step {step + 1} was interrupted and is finished now; of its metrics "
                f"there are only: {', '.join(sorted(metrics)) or 'none'}",
            )
        )
        await self._completed(step, metrics, phases)
        return step + 1

    async def _border(self, step: int, source: types.AdapterSource) -> Outcome | None:
        """What is to be done between two steps, when `step` of them are finished."""
        stop = self._spec.stop
        if self._context.pause_requested():
            return Outcome("paused", f"paused after step {step}")
        if is_due(self._spec, step) and self._evaluated_at != step:
            evaluation = await evaluate(
                self._spec, self._evaluation_tasks, source, self._rollouts, step=step
            )
            await self._record(evaluation)
            self._evaluated_at = step
            target = stop.evaluation_reward
            if target is not None and evaluation.reward_mean >= target:
                return Outcome(
                    "finished",
                    f"evaluation reward {evaluation.reward_mean:g} after step {step} reached "
                    f"stop.evaluation_reward {target:g}",
                )
        if step >= stop.max_steps:
            return Outcome("finished", f"all {stop.max_steps} steps are done")
        return None

    async def _step(
        self,
        step: int,
        source: types.AdapterSource,
        buffer: RolloutBuffer,
        tasks: asyncio.TaskGroup,
        under_way: set[asyncio.Task[None]],
    ) -> types.AdapterSource:
        """One optimizer step on version `step`; the source of version `step` + 1, which is live."""
        clock = asyncio.get_running_loop().time
        start = clock()
        phases = Phases()
        with telemetry.span("job.step", job=self._context.name, step=step + 1):
            # What is started here is part of this step's trace; with max_staleness > 0 it is
            # trained in a later one.
            for number in buffer.admit():
                task = tasks.create_task(self._admitted(number, source, buffer))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            with phases.phase("wait"):
                groups = await buffer.take(self._spec.algorithm.groups_per_step)
            if self._agreement.is_asked_for:
                with phases.phase("agreement"):
                    groups = await self._agreement.reached(
                        groups, step, partial(self._group, source=source)
                    )
            source, metrics = await self._train(step, groups, buffer, phases)
            buffer.release(len(groups))
            unload = tasks.create_task(self._learner.retire(newest=step + 1))
            under_way.add(unload)
            unload.add_done_callback(under_way.discard)
            phases.add("sample", sum(group.sample_s for group in groups) / len(groups))
            phases.add("reward", sum(group.reward_s for group in groups) / len(groups))
            phases.add("step", clock() - start)
            metrics |= of_groups(groups, step=step, step_s=phases.seconds["step"])
            telemetry.record("rollmesh.job.reward", metrics["reward_mean"])
            telemetry.record("rollmesh.job.staleness", metrics["staleness_max"])
            if "logprob_gap_max" in metrics:
                telemetry.record("rollmesh.job.logprob_gap", metrics["logprob_gap_max"])
            await self._completed(step, metrics, phases)
        return source

    async def _train(
        self, step: int, groups: Sequence[Group], buffer: RolloutBuffer, phases: Phases
    ) -> tuple[types.AdapterSource, dict[str, float]]:
        algorithm = self._spec.algorithm
        oldest = min(group.policy_version for group in groups)
        assert step - oldest <= algorithm.max_staleness, (step, oldest)  # noqa: S101 - the buffer's
        data = batch(groups, algorithm, max_tokens=self._spec.sampling.max_tokens)
        with phases.phase("forward_backward"):
            result = await self._learner.forward_backward(step, data)
        if self._agreement.is_asked_for:
            with phases.phase("agreement"):
                await self._agreement.look_at(buffer.waiting(), step)
        with phases.phase("optim_step"):
            metrics = of_trainer(result.metrics, await self._learner.optim_step(step))
        metrics |= gap_metrics(teaching(groups, algorithm), result.logprobs, step)
        source = await self._learner.go_live(step + 1, phases)
        return source, metrics

    async def _admitted(
        self, number: int, source: types.AdapterSource, buffer: RolloutBuffer
    ) -> None:
        buffer.put(await self._group(number, source))

    async def _group(self, number: int, source: types.AdapterSource) -> Group:
        with self._versions.drawn_from(source):
            return await self._rollouts.group(number, source)

    async def _completed(self, step: int, metrics: Mapping[str, float], phases: Phases) -> None:
        await self._record(
            StepCompleted(
                step=step + 1,
                policy_version=step + 1,
                metrics=dict(metrics),
                phases=phases.seconds,
            )
        )

    async def _record(self, happening: Happening) -> None:
        # Groups warn while a step is recorded: one event at a time.
        async with self._recording:
            await self._recorder.record(happening)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    failure = failures.exceptions[0]
    return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure

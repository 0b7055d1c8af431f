"""The GRPO loop of one managed job: sample and score groups, train on them, publish, repeat."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from rollmesh import telemetry
from rollmesh.job import StepCompleted, Warned
from services.coordinator.agreement import Agreement
from services.coordinator.border import Border
from services.coordinator.buffer import RolloutBuffer
from services.coordinator.curriculum import Curriculum
from services.coordinator.draws import Draws
from services.coordinator.group_bytes import group_from_bytes
from services.coordinator.learner import Learner
from services.coordinator.makers import making
from services.coordinator.metrics import Phases, emit
from services.coordinator.prompts import check_templates
from services.coordinator.retry import Outage, Patience
from services.coordinator.rollouts import TaskOrder
from services.coordinator.steps import Steps
from services.coordinator.supervised import Supervised
from services.coordinator.supply import Supply
from services.coordinator.teacher import Distillation
from services.coordinator.versions import Versions

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from rollmesh import chat, types
    from rollmesh.job import Happening
    from services.coordinator.border import Outcome
    from services.coordinator.datasets import Task
    from services.coordinator.groups import Group
    from services.coordinator.makers import Peers
    from services.coordinator.ports import JobContext, Recorder, TaskSource, Tokenizer


@dataclass(frozen=True, slots=True)
class Tasks:
    """What a job is trained and, by set, evaluated on; `info` is of their environment, if any."""

    training: Sequence[Task]
    evaluation: Mapping[str, Sequence[Task]]
    info: chat.EnvironmentInfo | None = None

    @property
    def digest(self) -> str:
        """Of the environment's tasks: others than before make another order of groups."""
        if self.info is None:
            return ""
        return hashlib.sha256("\n".join(task.id for task in self.training).encode()).hexdigest()


async def run(
    context: JobContext, peers: Peers, tasks: Tasks, *, tokenizer: Tokenizer, recorder: Recorder
) -> Outcome:
    """Run the job from where it is until its `stop`, or to the next border once pause is asked for.

    Raises:
        MeshError: what failed the job.
    """
    kept = await _kept(context)
    loop = _Loop(context, kept, peers, tasks, tokenizer=tokenizer, recorder=recorder)
    with telemetry.log_fields(job=context.name, adapter=context.adapter):
        await asyncio.to_thread(
            check_templates, context.spec, [*tasks.training, *chain(*tasks.evaluation.values())]
        )
        try:
            return await loop.run()
        except BaseExceptionGroup as failures:
            # What failed first cancelled the rest: the job's failure is that one error.
            failure = _first(failures)
        finally:
            peers.sampling.end_quarantines(context.name)
        # Out here, so that the error keeps its own cause.
        raise failure


class _Loop:
    def __init__(
        self,
        context: JobContext,
        kept: Mapping[int, Group],
        peers: Peers,
        tasks: Tasks,
        *,
        tokenizer: Tokenizer,
        recorder: Recorder,
    ) -> None:
        self._context = context
        self._spec = context.spec
        self._recorder = recorder
        self._recording = asyncio.Lock()
        algorithm, step = context.spec.algorithm, context.step
        self._tasks_digest = tasks.digest
        self._has_other_tasks = _has_changed(tasks, context)
        self._tasks = task_source(context, tasks)
        self._versions = Versions(
            before=range(max(0, step - algorithm.max_staleness - 1), step),
            continuing=context.spec.sampling.continue_on_newest,
        )
        trainer_patience = Patience("trainer", self._record, context.problems)
        self._learner = Learner(
            context,
            training=peers.training,
            sampling=peers.sampling,
            patience=trainer_patience,
            versions=self._versions,
        )
        self._agreement = Agreement(
            context, learner=self._learner, sampling=peers.sampling, warn=self._record
        )
        outage = Outage("sampler", self._record, context.problems)
        self._teacher: Distillation | None = None
        if context.spec.distillation is not None:
            self._teacher = Distillation(
                context, training=peers.training, sampling=peers.sampling, outage=outage
            )
        made = making(
            context,
            peers,
            tasks.info,
            tokenizer=tokenizer,
            draws=Draws(
                context.spec,
                context.name,
                sampling=peers.sampling,
                outage=outage,
                versions=self._versions,
            ),
            outage=outage,
            warn=self._record,
        )
        self._tolerance = made.tolerance
        self._steps = Steps(context.spec, self._learner, self._agreement)
        self._supply = Supply(
            algorithm,
            kept,
            tasks=self._tasks,
            maker=made.maker if context.spec.sft is None else Supervised(context.spec, tokenizer),
            teacher=self._teacher,
            recorder=recorder,
            versions=self._versions,
        )
        self._border = Border(
            context,
            made.maker,
            peers.checkpoints,
            tasks.evaluation,
            record=self._record,
            call=trainer_patience.call,
        )

    async def run(self) -> Outcome:
        self._agreement.begin()
        await self._look_at_tasks()
        if self._teacher is not None:
            await self._teacher.begin()
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
            while not (outcome := await self._border.outcome(step, source)):
                source = await self._step(step, source, buffer, tasks, under_way)
                step += 1
            # With max_staleness > 0 the next steps' groups are under way already.
            for task in under_way:
                task.cancel()
        return outcome

    async def _look_at_tasks(self) -> None:
        if self._has_other_tasks:
            message = (
                "the environment has other tasks than when the job began: groups from now on are "
                "of these, in another order"
            )
            if self._spec.curriculum is not None:
                message += ", and the curriculum begins anew"
            await self._record(Warned(reason="ENVIRONMENT_CHANGED", message=message))

    async def _recover(self, step: int) -> int:
        """The number of finished steps, after finishing one that was interrupted in the middle."""
        progress = await self._learner.progress(step)
        if progress == "clean":
            return step
        phases = Phases()
        per_step = self._spec.algorithm.groups_per_step
        groups = self._supply.take(range(step * per_step, (step + 1) * per_step))
        metrics, is_all = await self._steps.finish(
            step, progress, groups, self._supply.waiting(), phases
        )
        says = f"step {step + 1} was interrupted and is finished now"
        if not is_all:
            there = ", ".join(sorted(metrics)) or "none"
            says += f"; of its metrics there are only: {there}"
        await self._record(Warned(reason="STEP_RECOVERED", message=says))
        await self._completed(step, groups, metrics, phases)
        return step + 1

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
            admitted = buffer.admit()
            for group in self._supply.take(admitted):
                buffer.put(group)
            for number in buffer.missing(admitted):
                made = self._supply.group(number, source)
                task = tasks.create_task(self._made(made, buffer))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            with phases.phase("wait"):
                groups = await buffer.take(self._spec.algorithm.groups_per_step)
            if self._agreement.is_asked_for:
                with phases.phase("agreement"):
                    by_number = {group.number: group for group in groups}
                    groups = await self._agreement.reached(
                        groups,
                        step,
                        lambda number: self._supply.again(by_number[number], source),
                    )
            source, metrics = await self._steps.take(step, groups, buffer.waiting, phases)
            buffer.release(len(groups))
            unload = tasks.create_task(self._learner.retire(newest=step + 1))
            under_way.add(unload)
            unload.add_done_callback(under_way.discard)
            phases.add("step", clock() - start)
            if self._tolerance is not None:
                metrics["rollouts_given_up"] = float(self._tolerance.num_given_up)
            metrics["tokens_per_s"] = (
                metrics["num_tokens"] / phases.seconds["step"] if phases.seconds["step"] else 0.0
            )
            await self._completed(step, groups, metrics, phases)
        return source

    async def _made(self, made: Coroutine[None, None, Group], buffer: RolloutBuffer) -> None:
        buffer.put(await made)

    async def _completed(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], phases: Phases
    ) -> None:
        emit(metrics)
        completed = StepCompleted(
            step=step + 1, policy_version=step + 1, metrics=dict(metrics), phases=phases.seconds
        )
        async with self._recording:
            # With no event in between: what follows from a step is remembered with the step.
            self._tasks.observe(groups)
            await self._recorder.record(completed, memory=self._memory(self._border.memory))

    async def _record(
        self, happening: Happening, *, border: Mapping[str, Any] | None = None
    ) -> None:
        # Groups warn while a step is recorded: one event at a time.
        async with self._recording:
            memory = self._memory(border or self._border.memory)
            await self._recorder.record(happening, memory=memory)

    def _memory(self, border: Mapping[str, Any]) -> dict[str, Any]:
        """All that a successor has to know, besides the events and the groups: JSON."""
        return {
            "agreement": self._agreement.memory,
            "border": border,
            "tasks": self._tasks.memory,
            **({"teacher": self._teacher.memory} if self._teacher else {}),
            **({"tolerance": self._tolerance.memory} if self._tolerance else {}),
            **({"tasks_digest": self._tasks_digest} if self._tasks_digest else {}),
        }


async def _kept(context: JobContext) -> dict[int, Group]:
    """What the loop before has finished; nothing is left of the bytes."""
    bodies = await context.kept_groups()

    def read() -> dict[int, Group]:
        found = {number: group_from_bytes(body) for number, body in bodies.items()}
        return {number: group for number, group in found.items() if group is not None}

    # Up to hundreds of MiB: it would hold up everybody else.
    return await asyncio.to_thread(read)


def task_source(context: JobContext, tasks: Tasks) -> TaskSource:
    """What chooses the tasks of a job."""
    spec = context.spec
    if spec.curriculum is None:
        return TaskOrder(tasks.training, spec.seed)
    # What is remembered counts tasks by their places.
    memory = {} if _has_changed(tasks, context) else context.memory.get("tasks", {})
    return Curriculum(spec, tasks.training, step=context.step, memory=memory)


def _has_changed(tasks: Tasks, context: JobContext) -> bool:
    """Whether they are others than those that the loop before had."""
    digest = tasks.digest
    return bool(context.memory.get("tasks_digest", digest) != digest)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    failure = failures.exceptions[0]
    return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure

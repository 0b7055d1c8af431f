"""Jobs on a fleet: the loop of services/coordinator/loop.py and of the runner, as events.

Each job has the real RolloutBuffer; who gets a place on which sampler is the policy's business, and
that of the product is the real scheduler. What kills or stops the parts is at the end.
"""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING

from services.coordinator.scheduler import Projects, Request, RunningJob, WaitingJob, admit
from services.coordinator.simulation.clock import Clock
from services.coordinator.simulation.drawing import DAY_S, Drawing, Sampling
from services.coordinator.simulation.running_jobs import ModelledGroup, RunningModel
from services.coordinator.simulation.trace import Marked, Trace, Trained
from services.coordinator.simulation.trainers import ModelledTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from services.coordinator.simulation.calibration import Calibration
    from services.coordinator.simulation.jobs import JobModel
    from services.coordinator.simulation.policies import Policy
    from services.coordinator.simulation.trace import Phase


class World:
    """One fleet with one base model, and its jobs."""

    def __init__(
        self,
        jobs: Iterable[JobModel],
        *,
        num_samplers: int,
        num_trainers: int,
        calibration: Calibration,
        new_policy: Callable[[], Policy],
        projects: Projects,
        max_running_jobs: int,
        seed: int,
        trainer_speed: int = 1,
    ) -> None:
        """`new_policy`: called again when the coordinator begins anew.

        `trainer_speed`: machines that compute each pass together.
        """
        self.clock = Clock()
        self.trace = Trace()
        self.random = Random(seed)  # noqa: S311
        self._drawing = Drawing(
            self.clock,
            self.trace,
            calibration,
            num_samplers,
            new_policy=new_policy,
            ended=self._group_ended,
        )
        self._projects = projects
        self._max_running_jobs = max_running_jobs
        self._trainers = [
            ModelledTrainer(self.clock, calibration, speed=trainer_speed)
            for _ in range(num_trainers)
        ]
        self._trainer_of: dict[str, ModelledTrainer] = {}
        self._waiting_jobs: dict[str, tuple[JobModel, int]] = {}
        self._running: dict[str, RunningModel] = {}
        self._incarnation = 0
        self._num_left = 0
        for model in jobs:
            self._num_left += 1
            self._submit_at(model, self._num_left)

    def run(self, max_s: float = math.inf) -> Trace:
        """Until all jobs have ended, or it is `max_s`."""
        self.clock.at(DAY_S, self._midnight)
        while self._num_left and self.clock.now < max_s:
            self.clock.step()
        trace = self.trace
        trace.end = self.clock.now
        trace.samplers = {name: one.history for name, one in self._drawing.samplers.items()}
        trace.trainers = [trainer.busy for trainer in self._trainers]
        return trace

    @property
    def samplers(self) -> list[str]:
        """Their addresses."""
        return list(self._drawing.samplers)

    # Jobs

    def _submit_at(self, model: JobModel, order: int) -> None:
        def submit() -> None:
            self._mark("submitted", model.name)
            self._waiting_jobs[model.name] = model, order
            self._admit()
            self._drawing.pump()

        self.clock.at(model.submitted_s, submit)

    def _admit(self) -> None:
        now = self.clock.now
        verdicts = admit(
            [
                WaitingJob(model.name, model.project, "base", model.priority, order)
                for model, order in self._waiting_jobs.values()
            ],
            [
                RunningJob(name, job.model.project, "base", None)
                for name, job in self._running.items()
            ],
            self._projects,
            max_running=self._max_running_jobs,
            trained={"base"},
            sampled={"base"},
            used_today=lambda project: self._drawing.used.get((project, int(now // DAY_S)), 0),
            now=now,
        )
        for verdict in verdicts:
            if verdict.start:
                model, _ = self._waiting_jobs.pop(verdict.job.name)
                self._mark("started", model.name)
                number = len(self._trainer_of) % len(self._trainers)
                self._trainer_of[model.name] = self._trainers[number]
                job = self._running[model.name] = RunningModel(model, since=now)
                self.trace.steps[model.name] = []
                self.trace.phases[model.name] = []
                self._drawing.policy.job_started(model.name)
                self._begin_step(job)

    def _begin_step(self, job: RunningModel) -> None:
        if job.step == job.model.steps:
            self._enter(job, "sample")
            del self._running[job.model.name]
            self._drawing.policy.job_ended(job.model.name)
            self._num_left -= 1
            self._mark("ended", job.model.name)
            self._admit()
            return
        job.step_began = self.clock.now
        self._enter(job, "sample")
        for number in job.missing():
            self._ask(job, number)
        self._train_if_ready(job)

    def _ask(self, job: RunningModel, number: int) -> None:
        model = job.model
        lengths = [model.lengths.draw(self.random) for _ in range(model.group_size)]
        job.num_sampling += 1
        self._drawing.submit(
            Sampling(
                job,
                number,
                Request(
                    0,
                    model.project,
                    "base",
                    (model.name, job.step),
                    model.prompt_tokens,
                    model.group_size,
                    max_tokens=model.lengths.max_tokens,
                    job=model.name,
                    priority=model.priority,
                ),
                dict(enumerate(lengths)),
                sum(lengths) + model.prompt_tokens * model.group_size,
            )
        )

    def _group_ended(self, sampling: Sampling) -> None:
        job = sampling.job
        job.num_sampling -= 1
        if not job.num_sampling and not job.training:
            self._enter(job, "reward")
        version = sampling.request.policy[1] if sampling.request.policy else 0
        group = ModelledGroup(sampling.number, version, sampling.num_tokens)
        incarnation = self._incarnation

        def scored() -> None:
            if incarnation != self._incarnation:
                return
            self._mark("scored", job.model.name, group.number)
            job.put(group)
            self._train_if_ready(job)

        self.clock.after(job.model.draw_reward_s(self.random), scored)

    def _train_if_ready(self, job: RunningModel) -> None:
        if job.training or not job.is_ready():
            return
        groups = job.take()
        job.training = True
        self._enter(job, "queue")
        tokens = sum(group.num_tokens for group in groups)

        def trained(began: float) -> None:
            self._trained(job, groups, tokens, began)

        self._trainer_of[job.model.name].submit(tokens, trained)

    def _trained(
        self, job: RunningModel, groups: list[ModelledGroup], tokens: int, began: float
    ) -> None:
        now = self.clock.now
        self._enter(job, "train", at=began)
        numbers = tuple((group.number, group.policy_version) for group in groups)
        self.trace.happened.append(Trained(now, job.model.name, job.step, numbers, tokens, began))
        self.trace.steps[job.model.name].append(now - job.step_began)
        job.trained(groups)
        self._begin_step(job)
        self._drawing.pump()

    def _enter(self, job: RunningModel, phase: Phase, *, at: float | None = None) -> None:
        """It was in its phase until now, and is in the next."""
        now = self.clock.now if at is None else at
        if now > job.since:
            self.trace.phases[job.model.name].append((job.phase, job.since, now))
        job.phase, job.since = phase, now

    def _midnight(self) -> None:
        self.clock.after(DAY_S, self._midnight)
        self._admit()
        self._drawing.pump()

    def _mark(self, what: str, subject: str, number: int = 0) -> None:
        self.trace.happened.append(Marked(self.clock.now, what, subject, number))  # type: ignore[arg-type]

    # What goes wrong

    def sampler_dies(self, address: str) -> None:
        """What runs there goes on with what it has drawn, elsewhere."""
        self._drawing.dies(address)

    def sampler_returns(self, address: str) -> None:
        """As a new process: it has pulled nothing."""
        self._drawing.returns(address)

    def trainer_pauses(self, seconds: float) -> None:
        """None begins anything for so long."""
        for trainer in self._trainers:
            trainer.pause(seconds)

    def coordinator_restarts(self) -> None:
        """What is drawn or scored is lost; kept groups, steps under way, and usage are not."""
        self._incarnation += 1
        self._drawing.begin_anew()
        self._mark("restart", "")
        for name, job in self._running.items():
            self._drawing.policy.job_started(name)
            if job.training:
                # The op is in the journal and ends; the loop goes on with the step after it.
                job.recovered = True
            else:
                job.recover()
                self._begin_step(job)
        self._drawing.pump()

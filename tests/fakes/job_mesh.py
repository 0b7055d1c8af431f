"""Everything that a job's loop talks to, as one small world with random latencies.

The trainer keeps its sequences as protos/ says, each sampled token is unique and is remembered with
the version and the sampler that drew it, so a test sees what was trained on what, whatever the loop
says.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollmesh import chat, types
from rollmesh.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    SequenceGap,
)
from rollmesh.job import EvaluationCompleted, JobSpec, StepCompleted, Warned
from services.coordinator import border, loop
from services.coordinator.datasets import Task
from services.coordinator.evaluation import is_better
from services.coordinator.group_bytes import group_from_bytes
from services.coordinator.makers import Peers
from tests.fakes.worlds import FakeEnvironments

TEACHER = "projects/p/adapters/teacher"
JOB, ADAPTER = "projects/p/jobs/j", "projects/p/adapters/j"
TASKS = [Task(id=f"t{n}", fields={"question": f"q{n}", "answer": str(n)}) for n in range(7)]
HELD_OUT = [Task(id=f"h{n}", fields={"question": f"h{n}", "answer": str(n)}) for n in range(5)]


def spec(*, algorithm: dict[str, Any] | None = None, **values: Any) -> JobSpec:
    defaults = {
        "base_model": "tiny",
        "dataset": {"tasks": [{"fields": task.fields} for task in TASKS]},
        "prompt": {"text": "{question}="},
        "reward": {"function": "exact", "reference": "{answer}"},
        "stop": {"max_steps": 6},
        "seed": 11,
    }
    sizes = {"group_size": 2, "groups_per_step": 3, "max_staleness": 0}
    return JobSpec.model_validate(
        {**defaults, "algorithm": {**sizes, **(algorithm or {})}, **values}
    )


def held_out(**values: Any) -> dict[str, Any]:
    return {"dataset": {"tasks": [{"fields": task.fields} for task in HELD_OUT]}, **values}


@dataclass
class Context:
    """What the store would tell a new loop: it follows from the events recorded so far."""

    spec: JobSpec
    events: list[Any] = field(default_factory=list)
    name: str = JOB
    adapter: str = ADAPTER
    pause_after: int | None = None
    hold_step: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    kept: dict[int, bytes] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return sum(isinstance(event, StepCompleted) for event in self.events)

    @property
    def last_evaluation_step(self) -> int | None:
        return self.evaluated_at[-1] if self.evaluated_at else None

    @property
    def evaluated_at(self) -> list[int]:
        return [event.step for event in self.evaluations if not event.set]

    @property
    def evaluations(self) -> list[EvaluationCompleted]:
        return [event for event in self.events if isinstance(event, EvaluationCompleted)]

    @property
    def best_evaluation(self) -> EvaluationCompleted | None:
        best = None
        for event in self.evaluations:
            if not event.set and is_better(event, best, self.spec.stop.min_improvement):
                best = event
        return best

    @property
    def steps(self) -> list[StepCompleted]:
        return [event for event in self.events if isinstance(event, StepCompleted)]

    @property
    def warnings(self) -> list[str]:
        return [event.reason for event in self.events if isinstance(event, Warned)]

    async def kept_groups(self) -> dict[int, bytes]:
        return dict(self.kept)

    def pause_requested(self) -> bool:
        return self.pause_after is not None and self.step >= self.pause_after


class Letters:
    """A token for each character; tokens of completions are beyond them and read as numbers."""

    def render(self, messages, tools=None):
        return self.encode("".join(message["content"] for message in messages))

    def follow(self, observation, last_token, tools=None):
        return self.render(observation)

    @property
    def special_tokens(self):
        return []

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(chr(token) if token < FIRST_TOKEN else f"<{token}>" for token in token_ids)

    def answer(self, messages, text):
        return self.encode(f"{text}$")

    def ending(self, text):
        return self.encode(f"{text}.")

    @property
    def vocabulary(self):
        return {}


FIRST_TOKEN = 1000
POLICY_LOGPROB = -0.5
"""Of every sampled token at temperature 1, as the trainer computes it."""


def logprob(temperature):
    """Another at each temperature, as it is in a model."""
    return POLICY_LOGPROB / (temperature or 1.0)


@dataclass
class Teacher:
    """The adapter that judges, and the digests of its versions."""

    logprob: Any = lambda token: -0.25
    max_length: int = 10**9
    versions: dict[int, str] = field(default_factory=lambda: {7: "taught"})
    judged: list[tuple[str, Any]] = field(default_factory=list)


class JobMesh:
    """Training, Sampling, RewardPort and Recorder of one job; faults and slowness by call."""

    def __init__(self, context: Context, *, seed: int = 0, latency_s: float = 1.0) -> None:
        self.context = context
        self.rng = random.Random(seed)
        self.routing = random.Random(seed)
        self.latency_s = latency_s
        self.version = 0
        self.next_sequence = 1
        self.pending = False
        self.answers: dict[int, tuple[Any, Any]] = {}
        self.published: dict[int, str] = {}
        self.live: set[int] = set()
        self.sampled_from: dict[int, int] = {}
        self.sampled_by: dict[int, str] = {}
        self.samplers = ["s1", "s2"]
        self.drift: dict[str, float] = {}
        self.quarantined: dict[str, str] = {}
        self.in_quarantine: set[str] = set()
        self.num_ended = 0
        self.forwarded: list[tuple[int, int]] = []
        self.params: list[types.SamplingParams] = []
        self.pieces = 1
        self.piece_s = 1.0
        self.prompt_of: dict[int, str] = {}
        self.trained_at: dict[int, int] = {}
        self.data: list[list[types.Datum]] = []
        self.loss_configs: list[types.LossConfig] = []
        self.adams: list[types.AdamConfig] = []
        self.evaluation_prompts: list[tuple[int, str]] = []
        self.seeds: list[int] = []
        self.faults: dict[str, list[Exception]] = {}
        self.slowness: dict[str, float] = {}
        self.under_way: list[str] = []
        self.overlapped = False
        self.same_rewards = False
        self.tasks = TASKS
        self.equal_share = 0.0
        self.seed_of: dict[int, int] = {}
        self.finished: set[int] = set()
        self.sampler_losses = 0.0
        self.spans = lambda source, num_tokens: None
        self.length = lambda: self.rng.randint(1, 4)
        self.evaluation_rewards: dict[int, float] = {}
        self.evaluation_sets: dict[str, list[Task]] = {}
        self.teacher = Teacher()
        self.checkpoints: dict[str, int] = {}
        self.checkpoint_requests: set[str] = set()
        self.last_event_at = 0.0
        self.max_length: int | None = None
        self.world = FakeEnvironments()
        self._next_token = FIRST_TOKEN

    async def run(self, tokenizer=None) -> border.Outcome:
        tokenizer = tokenizer or Letters()
        return await loop.run(
            self.context,
            Peers(
                training=self,
                sampling=self,
                reward=self,
                environments=self.world,
                checkpoints=self,
                load_tokenizer=lambda _: tokenizer,
            ),
            loop.Tasks(
                self.tasks,
                {"": HELD_OUT, **self.evaluation_sets},
                self.world.info if self.context.spec.environment else None,
            ),
            tokenizer=tokenizer,
            recorder=self,
        )

    @contextlib.asynccontextmanager
    async def _call(self, name: str):
        """A call takes its time on the way there and back, and may fail on either."""
        self.under_way.append(name)
        latency_s = self.latency_s * self.slowness.get(name, 1.0)
        try:
            await asyncio.sleep(self.rng.expovariate(1.0) * latency_s)
            fault = self.faults.get(name) and self.faults[name].pop(0)
            if fault and self.rng.random() < 0.5:
                raise fault
            yield
            if fault:
                raise fault
            await asyncio.sleep(self.rng.expovariate(1.0) * latency_s)
        finally:
            self.under_way.remove(name)

    # The trainer

    async def get_adapter(self, name):
        async with self._call("get_adapter"):
            return types.Adapter(
                name=name,
                base_model="tiny",
                lora=types.LoraConfig(rank=4),
                policy_version=self.version,
                published_version=None,
                published_digest="",
                next_sequence=self.next_sequence,
                create_time=0.0,
                job=JOB,
            )

    async def forward_backward(self, adapter, sequence, data, loss_config, *, job):
        assert (adapter, job) == (ADAPTER, JOB)
        async with self._call("forward_backward"):
            self.overlapped |= "sample" in self.under_way
            body = [datum.token_ids.tobytes() for datum in data]
            return self._once(sequence, body, lambda: self._train(data, loss_config))

    def _train(self, data, loss_config):
        for datum in data:
            for token in datum.target_token_ids[datum.target_token_ids >= FIRST_TOKEN].tolist():
                assert token not in self.trained_at, "a rollout was trained twice"
                self.trained_at[token] = self.version
        self.pending = True
        self.data.append(list(data))
        self.loss_configs.append(loss_config)
        logprobs = [np.full(len(d.token_ids), logprob(loss_config.temperature)) for d in data]
        ratios = [
            np.exp(of_policy - datum.sampling_logprobs)[datum.weights > 0]
            for of_policy, datum in zip(logprobs, data, strict=True)
            if datum.sampling_logprobs is not None
        ]
        metrics = {
            "loss": 1.0,
            "kl_sampler": 0.0,
            "num_tokens": 1.0,
            "queued_s": 0.25,
            "run_s": 1.0,
        }
        if ratios:
            metrics["ratio_max"] = float(np.concatenate(ratios).max())
        if loss_config.kl_coefficient is not None:
            metrics["kl_base"] = 0.1
        return types.ForwardBackwardResult(tuple(logprobs), metrics)

    async def forward(self, adapter, data, *, temperature=None):
        assert adapter == ADAPTER
        async with self._call("forward"):
            self.forwarded.append((self.version, len(data)))
            found = [np.full(len(datum.token_ids), logprob(temperature)) for datum in data]
            return types.ForwardResult(tuple(found))

    async def optim_step(self, adapter, sequence, adam, *, job):
        assert (adapter, job) == (ADAPTER, JOB)
        async with self._call("optim_step"):
            return self._once(sequence, adam, lambda: self._optimize(adam))

    def _optimize(self, adam):
        if not self.pending:
            raise FailedPrecondition("no gradients are pending")
        self.pending = False
        self.version += 1
        self.adams.append(adam)
        metrics = {"grad_norm": 2.0, "learning_rate": 9.0, "queued_s": 0.5, "run_s": 2.0}
        return types.OptimStepResult(self.version, metrics)

    def _once(self, sequence, body, op):
        if sequence in self.answers:
            stored, answer = self.answers[sequence]
            if stored != body:
                raise AlreadyExists(f"sequence {sequence} had another body")
            return answer
        if sequence != self.next_sequence:
            raise SequenceGap("gap", expected_sequence=self.next_sequence)
        answer = op()
        self.answers[sequence] = body, answer
        self.next_sequence += 1
        return answer

    async def publish_adapter(self, name):
        async with self._call("publish"):
            if self.pending:
                raise FailedPrecondition("gradients are pending")
            self.published[self.version] = f"digest-{self.version}"
            return types.PublishedVersion(self.version, self.published[self.version])

    async def resolve(self, policy):
        if policy.adapter == TEACHER:
            if policy.policy_version not in self.teacher.versions:
                raise NotFound(f"there is no version {policy.policy_version}")
            digest = self.teacher.versions[policy.policy_version]
            return "tiny", types.AdapterSource(TEACHER, policy.policy_version, digest, "trainer")
        digest = self.published[policy.policy_version]
        return "tiny", types.AdapterSource(policy.adapter, policy.policy_version, digest, "trainer")

    # The samplers

    def context_length(self, base_model):
        return self.max_length

    async def load(self, base_model, source):
        async with self._call("load"):
            assert source.policy_version in self.published
            self.live.add(source.policy_version)

    async def unload(self, base_model, adapter, policy_version):
        assert policy_version not in self.versions_in_use, "unloaded under a request"
        self.live.discard(policy_version)

    @property
    def versions_in_use(self):
        return {int(name.split()[1]) for name in self.under_way if name.startswith("version ")}

    def quarantine(self, job, sampler, reason):
        assert job == JOB
        assert sampler not in self.in_quarantine
        self.in_quarantine.add(sampler)
        self.quarantined[sampler] = reason

    def end_quarantines(self, job):
        assert job == JOB
        self.in_quarantine.clear()
        self.num_ended += 1

    async def sample(
        self,
        project,
        base_model,
        source,
        prompt_token_ids,
        num_completions,
        params,
        *,
        lost,
        newest=None,
        job,
        priority,
    ):
        assert (project, base_model, job) == ("p", "tiny", JOB)
        assert priority == self.context.spec.priority
        if not self.quarantined:
            assert params.seed not in self.finished, "a finished group was sampled again"
        prompt = Letters().decode(prompt_token_ids)
        with self._using(source):
            async with self._call("sample"):
                if self.rng.random() < self.sampler_losses:
                    await lost("connection refused")
                    await asyncio.sleep(self.latency_s)
                if params.temperature == 0:
                    self.evaluation_prompts.append((source.policy_version, prompt))
                else:
                    self.seeds.append(params.seed)
                    self.params.append(params)
                async with asyncio.TaskGroup() as tasks:
                    drawn = [
                        tasks.create_task(self._completion(source, prompt, params, lost, newest))
                        for _ in range(num_completions)
                    ]
                return [each.result() for each in drawn]

    async def _completion(self, source, prompt, params, lost, newest):
        """In `pieces`, each from what is newest by then, and from any sampler."""
        version, chunks = source, []
        for piece in range(self.pieces):
            if newest is not None:
                assert newest.source.policy_version >= version.policy_version
                version = newest.source
            sampler = await self._sampler(lost)
            with self._using(version):
                chunk = self._chunk(version, sampler, prompt, params)
                chunks.append(chunk)
                if piece + 1 < self.pieces:
                    await asyncio.sleep(self.rng.expovariate(1.0) * self.piece_s)
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        reason = "length" if num_tokens == 4 else "stop"
        completion = types.join_chunks([*chunks, types.CompletionChunk(0, (), (), (), reason)])
        if (claimed := self.spans(source, num_tokens)) is None:
            return completion
        return dataclasses.replace(completion, spans=claimed)

    async def _sampler(self, lost):
        for _ in range(5000):
            if serving := [name for name in self.samplers if name not in self.in_quarantine]:
                return self.routing.choice(serving)
            await lost("no sampler serves")
            await asyncio.sleep(self.latency_s)
        raise AssertionError("no sampler has come back")

    @contextlib.contextmanager
    def _using(self, source):
        in_use = f"version {source.policy_version}"
        assert source.policy_version in self.live, "sampled while the version was not live"
        self.under_way.append(in_use)
        try:
            yield
        finally:
            self.under_way.remove(in_use)

    def _chunk(self, source, sampler, prompt, params):
        tokens = tuple(range(self._next_token, self._next_token + self.length()))
        self._next_token += len(tokens)
        if params.temperature != 0:
            for token in tokens:
                self.sampled_from[token] = source.policy_version
                self.sampled_by[token] = sampler
                self.prompt_of[token] = prompt
                self.seed_of[token] = params.seed
        kind = params.temperature if params.logprobs_kind == "sampled" else 1.0
        drifted = float(logprob(kind) if params.temperature else 0.0) + self.drift.get(sampler, 0.0)
        return types.CompletionChunk(
            index=0,
            token_ids=tokens,
            logprobs=tuple(drifted for _ in tokens),
            spans=(types.PolicySpan(len(tokens), source.policy_version, source.digest, sampler),),
        )

    # The reward service

    async def score_each(self, function, parameters, items, *, judge):
        async with self._call("score"):
            if any(item.prompt.startswith("h") for item in items):
                rewards = [self.evaluation_rewards.get(self.version, 0.5) for _ in items]
            elif self.same_rewards or self._is_equal(items):
                rewards = [1.0 for _ in items]
            else:
                rewards = [float(index) for index, _ in enumerate(items)]
            return [chat.ItemScore(index, reward) for index, reward in enumerate(rewards)]

    def _is_equal(self, items):
        """Of `equal_share` of all groups, the same ones in every life."""
        first = int(items[0].completion.split(">")[0].removeprefix("<"))
        seed = self.seed_of.get(first)  # None: it is an evaluation's
        return seed is not None and random.Random(seed).random() < self.equal_share

    async def list_environments(self):
        return []

    # A teacher

    async def compute_logprobs(
        self, project, base_model, source, token_ids, *, job="", lost=None, priority="normal"
    ):
        assert (project, job, priority) == ("p", JOB, self.context.spec.priority)
        async with self._call("compute_logprobs"):
            if self.rng.random() < self.sampler_losses:
                await lost("connection refused")
            self.teacher.judged.append((base_model, source))
            if len(token_ids) > self.teacher.max_length:
                raise InvalidRequest("too long", field="token_ids")
            logprobs = (float("nan"), *(self.teacher.logprob(t) for t in token_ids[1:]))
            return types.Logprobs(logprobs, types.PolicySpan(len(logprobs), 0, "", "s1"))

    # Checkpoints

    async def create_checkpoint(self, name, *, ttl_s, request_id):
        async with self._call("create_checkpoint"):
            if request_id not in self.checkpoint_requests:
                assert name not in self.checkpoints
                self.checkpoint_requests.add(request_id)
                self.checkpoints[name] = self.version

    async def delete_checkpoint(self, name, *, request_id):
        async with self._call("delete_checkpoint"):
            if request_id not in self.checkpoint_requests:
                if name not in self.checkpoints:
                    raise NotFound(f"there is no {name}")
                self.checkpoint_requests.add(request_id)
                del self.checkpoints[name]

    # The store

    async def record(self, happening, *, memory=None):
        assert "record" not in self.under_way, "two events at once"
        async with self._transaction("record"):
            self.context.events.append(happening)
            if memory is not None:
                self.context.memory = json.loads(json.dumps(memory))
            if isinstance(happening, StepCompleted):
                trained = happening.step * self.context.spec.algorithm.groups_per_step
                self.context.kept = {n: b for n, b in self.context.kept.items() if n >= trained}
        self.last_event_at = asyncio.get_running_loop().time()

    async def keep(self, number, group):
        async with self._transaction("keep"):
            first = group_from_bytes(group).rollouts[0].turns[0].completion.token_ids[0]
            # What is trained is let go of with its event: nobody may bring it back.
            assert number >= self.context.step * self.context.spec.algorithm.groups_per_step
            self.context.kept[number] = group
            if first >= FIRST_TOKEN:
                self.finished.add(self.seed_of[first])

    @contextlib.asynccontextmanager
    async def _transaction(self, name):
        """Whoever dies in it may have had it committed, or not."""
        self.under_way.append(name)
        try:
            await asyncio.sleep(self.rng.expovariate(1.0) * self.latency_s * 0.05)
            yield
            await asyncio.sleep(self.rng.expovariate(1.0) * self.latency_s * 0.05)
        finally:
            self.under_way.remove(name)

    @property
    def staleness(self) -> list[int]:
        return [self.trained_at[token] - self.sampled_from[token] for token in self.trained_at]

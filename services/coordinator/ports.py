"""What the coordinator's core asks of the outside, and its parts of each other, as protocols.

The clients in `rollmesh.client` fulfil the first three; `__main__` plugs them in, tests plug in
fakes that behave. No core module knows gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Awaitable,
        Callable,
        Mapping,
        MutableMapping,
        Sequence,
    )
    from contextlib import AbstractAsyncContextManager

    from rollmesh import chat, types
    from rollmesh.job import EvaluationCompleted, Happening, JobSpec, Priority
    from services.coordinator.datasets import Task
    from services.coordinator.groups import Group
    from services.coordinator.newest import Newest


OpKind: TypeAlias = Literal["forward_backward", "optim_step", "load_snapshot"]

Lost: TypeAlias = "Callable[[str], Awaitable[None]]"
"""Hears why a call waits for a peer."""

Problems: TypeAlias = "MutableMapping[str, str]"
"""What a job waits for now because it is away, by peer, for a person to read."""


class TrainerPort(Protocol):
    """A trainer, as `rollmesh.client.TrainerClient` is one. Every method raises MeshError."""

    async def get_trainer(self) -> types.TrainerInfo: ...

    async def create_adapter(
        self,
        name: str,
        lora: types.LoraConfig | None,
        *,
        epoch: int,
        fork_of: types.Snapshot | None = None,
        with_optimizer: bool = False,
    ) -> types.TrainerAdapter: ...

    async def restore_adapter(
        self, name: str, snapshot: types.Snapshot, *, epoch: int
    ) -> types.TrainerAdapter: ...

    async def get_adapter(self, name: str) -> types.TrainerAdapter: ...

    async def delete_adapter(self, name: str, *, epoch: int) -> None: ...

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
        *,
        epoch: int,
    ) -> types.ForwardBackwardResult: ...

    async def forward(
        self,
        adapter: str,
        data: Sequence[types.Datum],
        *,
        temperature: float | None = None,
        loss_config: types.LossConfig | None = None,
    ) -> types.ForwardResult: ...

    async def optim_step(
        self, adapter: str, sequence: int, adam: types.AdamConfig, *, epoch: int
    ) -> types.OptimStepResult: ...

    async def load_snapshot(
        self,
        adapter: str,
        sequence: int,
        snapshot: types.Snapshot,
        *,
        with_optimizer: bool,
        epoch: int,
    ) -> types.LoadResult: ...

    async def snapshot_adapter(self, name: str, *, epoch: int) -> types.Snapshot: ...

    async def publish_adapter(
        self, name: str, *, epoch: int, with_pending_gradients: bool = False
    ) -> types.PublishedVersion: ...

    def export_adapter(
        self, name: str, policy_version: int, *, offset: int = 0
    ) -> AsyncGenerator[types.AdapterExport | bytes | str]:
        """A header, then chunks of the safetensors file from `offset` on, then the digest."""
        ...


class OpCodec(Protocol):
    """Ops and results to bytes and back: the module `rollmesh.convert.journal` is one."""

    def op_to_bytes(self, op: types.TrainingOp) -> tuple[OpKind, bytes]: ...

    def op_from_bytes(self, kind: OpKind, body: bytes) -> types.TrainingOp: ...

    def result_to_bytes(self, result: types.TrainingResult) -> bytes: ...

    def result_from_bytes(self, kind: OpKind, body: bytes) -> types.TrainingResult: ...


class SamplerPort(Protocol):
    """A sampler, as `rollmesh.client.SamplerClient` is one. Every method raises MeshError."""

    async def get_sampler(self) -> types.SamplerInfo: ...

    async def load_adapter(self, source: types.AdapterSource) -> types.LoadTimes: ...

    async def unload_adapter(self, adapter: str, policy_version: int | None = None) -> None: ...

    def sample(
        self,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        project: str,
        continuations: Sequence[types.Continuation] = (),
    ) -> AsyncGenerator[types.CompletionChunk]:
        """The chunks of all completions, or of `continuations` alone.

        Each completion's are in order, its last has a stop_reason. A stream that is silent for
        SILENCE_S raises Unavailable.
        """
        ...

    async def compute_logprobs(
        self, source: types.AdapterSource | None, token_ids: Sequence[int], *, project: str
    ) -> types.Logprobs: ...


class RewardPort(Protocol):
    """A reward service, as `rollmesh.client.RewardClient` is one. Every method raises MeshError."""

    async def score_each(
        self,
        function: str,
        parameters: Mapping[str, Any],
        items: Sequence[types.ScoreItem],
        *,
        judge: Callable[[chat.Question], Awaitable[str]],
    ) -> list[chat.ItemScore]: ...

    async def list_environments(self) -> list[chat.EnvironmentStatus]: ...


class EpisodePort(Protocol):
    """An episode under way, as `rollmesh.client.Episode` is one."""

    first: chat.Response

    async def act(self, action: chat.Message) -> chat.Response: ...

    async def give_up(self) -> chat.Response | None: ...


class EnvironmentPort(Protocol):
    """The environments of a reward service, as `rollmesh.client.EnvironmentClient` reaches them.

    Every method raises MeshError.
    """

    async def describe(self) -> list[chat.EnvironmentInfo]: ...

    async def list_tasks(
        self, environment: str, split: str, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[chat.Task], str]: ...

    async def score(
        self, environment: str, items: Sequence[chat.Answered]
    ) -> list[chat.Scored]: ...

    def episode(
        self, environment: str, task_id: str, *, seed: int = 0
    ) -> AbstractAsyncContextManager[EpisodePort]: ...


class Training(Protocol):
    """Training ops on the adapters that this coordinator knows, wherever their trainer is.

    `services/coordinator/adapters.py` is one. `job` is the job that asks, or "" for an interactive
    client: an adapter that a job owns is trained by that job alone.
    """

    async def create_adapter(
        self,
        name: str,
        base_model: str,
        lora: types.LoraConfig,
        *,
        job: str,
        request_id: str,
        num_versions: int = 1,
    ) -> types.Adapter:
        """On a trainer that keeps at least `num_versions` of its versions."""
        ...

    async def get_adapter(self, name: str) -> types.Adapter:
        """As its journaled ops left it, all of which are settled.

        Raises:
            Unavailable: one of them is not: it waits for a trainer that is away.
        """
        ...

    async def forward_backward(
        self,
        adapter: str,
        sequence: int,
        data: Sequence[types.Datum],
        loss_config: types.LossConfig,
        *,
        job: str,
    ) -> types.ForwardBackwardResult: ...

    async def forward(
        self,
        adapter: str,
        data: Sequence[types.Datum],
        *,
        temperature: float | None = None,
        loss_config: types.LossConfig | None = None,
    ) -> types.ForwardResult:
        """Log-probabilities of the targets by the current weights, at `temperature` (None: 1).

        With a loss, which has a temperature of its own, its metrics too.
        """
        ...

    async def optim_step(
        self, adapter: str, sequence: int, adam: types.AdamConfig, *, job: str
    ) -> types.OptimStepResult: ...

    async def publish_adapter(self, name: str) -> types.PublishedVersion: ...

    async def resolve(self, policy: types.PolicyRef) -> tuple[str, types.AdapterSource | None]:
        """Base model, and the published version with its digest and trainer; None: no adapter."""
        ...


class Sampling(Protocol):
    """The shared sampler fleet behind its scheduler: `services/coordinator/sampling.py` is one."""

    def stream(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        newest: Newest | None = None,
        priority: Priority = "normal",
        told: Callable[[str], None] | None = None,
    ) -> AsyncGenerator[types.CompletionChunk]:
        """Chunks as they come. `project` is an id, not a name.

        With `newest`, completions under way move to each newer version, at the border of a chunk.
        `told` hears the scheduler's subject of each request that it makes of this one.
        """
        ...

    async def sample(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        prompt_token_ids: Sequence[int],
        num_completions: int,
        params: types.SamplingParams,
        *,
        lost: Lost,
        newest: Newest | None = None,
        job: str = "",
        priority: Priority = "normal",
    ) -> list[types.Completion]:
        """Whole completions, by index; a lost sampler costs time, and `lost` hears of it.

        `newest` as in `stream`. `job`: whose quarantines hold; empty: nobody's. Over a quota of the
        project it waits.

        Raises:
            SourceUnavailable: the samplers cannot have the version from its trainer.
        """
        ...

    async def compute_logprobs(
        self,
        project: str,
        base_model: str,
        source: types.AdapterSource | None,
        token_ids: Sequence[int],
        *,
        job: str = "",
        lost: Lost | None = None,
        priority: Priority = "normal",
    ) -> types.Logprobs:
        """Log-probability of each token given those before it; the first is NaN.

        With `job` and `lost` it waits as `sample` does.
        """
        ...

    def context_length(self, base_model: str) -> int | None:
        """Tokens of prompt and completion together that every sampler takes; None: not known."""
        ...

    async def load(self, base_model: str, source: types.AdapterSource) -> None:
        """Return once the version is live on the samplers of the base model that are serving.

        Not at once, but for a bounded time only: what is not loaded by then is with first use.
        """
        ...

    async def unload(self, base_model: str, adapter: str, policy_version: int | None) -> None:
        """Let go of a version (None: all) everywhere; best effort."""
        ...

    def quarantine(self, job: str, sampler: str, reason: str) -> None:
        """Ask nothing more for `job` of the sampler process with this instance_id."""
        ...

    def end_quarantines(self, job: str) -> None:
        """`job` runs no more, or begins anew."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back, for one base model: `rollmesh.tokenizer.ModelTokenizer`."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """A chat with its generation prompt, by the model's chat template."""
        ...

    def follow(
        self,
        observation: Sequence[Mapping[str, Any]],
        last_token: int | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """What comes after a turn that was drawn, up to the next generation prompt."""
        ...

    @property
    def special_tokens(self) -> Sequence[str]:
        """As text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Plain text, with the special tokens that the tokenizer adds to a text's start."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text, without special tokens or with them."""
        ...

    def answer(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[int]:
        """An assistant's turn that says `text` after `render(messages)`, ended as turns end."""
        ...

    def ending(self, text: str) -> list[int]:
        """What goes on after another text and ends there: without start, with end of sequence."""
        ...

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Every token's id."""
        ...


class TaskSource(Protocol):
    """Which task each group of a job has: `TaskOrder` in services/coordinator/rollouts.py."""

    def choose(self, number: int, attempt: int) -> Task:
        """The task of group `number`; with `attempt` > 0 that of what replaces it.

        Asked when the group is admitted, in the order of the numbers, and when one is replaced. The
        same again, also by a successor, for as long as the group is not trained.
        """
        ...

    def observe(self, groups: Sequence[Group]) -> None:
        """A step was trained on `groups`: told once for each step, in order, with its event."""
        ...

    @property
    def memory(self) -> Mapping[str, Any]:
        """What a successor has to know to choose the same, JSON; recorded with every event."""
        ...


class GroupMaker(Protocol):
    """Makes finished groups: services/coordinator/supervised.py has one that draws nothing."""

    async def group(
        self, number: int, source: types.AdapterSource, task: Task, attempt: int = 0
    ) -> Group | None:
        """The group of that number, of `task`, where it is sampled from `source` or later.

        None: its environment failed at it, which has been counted.
        """
        ...


class RolloutMaker(GroupMaker, Protocol):
    """Draws them: of single turns in services/coordinator/rollouts.py, else in episodes.py."""

    async def evaluated(
        self, tasks: Sequence[Task], source: types.AdapterSource
    ) -> list[float | None]:
        """The reward of one greedy rollout of each task, in order, which `source` draws.

        None: its environment failed at it, which has been counted.
        """
        ...


class Teacher(Protocol):
    """Says how likely another policy finds what was drawn: services/coordinator/teacher.py."""

    async def logprobs(self, group: Group) -> Sequence[Sequence[float]]:
        """Of each completion of the group the log-probability of each of its tokens."""
        ...


class Recorder(Protocol):
    """Where a running job writes what happens to it: one event, one transaction."""

    async def record(
        self, happening: Happening, *, memory: Mapping[str, Any] | None = None
    ) -> None:
        """Store the next event and what follows from it for the job: step, metrics, evaluations.

        `memory`: what the loop is to know from then on, JSON, instead of what it knew; None: as it
        was. With the event of a step the groups that it was trained on are let go.
        """
        ...

    async def keep(self, number: int, group: bytes) -> None:
        """Store a finished group: whoever goes on with the job finds it and samples it no more."""
        ...


class JobContext(Protocol):
    """What the loop knows of the job that it runs."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> JobSpec: ...

    @property
    def adapter(self) -> str:
        """Resource name of the adapter, which exists."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps recorded as finished when the loop is started."""
        ...

    @property
    def last_evaluation_step(self) -> int | None:
        """Step of the newest evaluation of evaluation.dataset recorded when the loop is started."""
        ...

    @property
    def best_evaluation(self) -> EvaluationCompleted | None:
        """The best one recorded when the loop is started."""
        ...

    @property
    def memory(self) -> Mapping[str, Any]:
        """What was recorded with the newest event that brought any; empty at first."""
        ...

    @property
    def hold_step(self) -> int | None:
        """The step at which to wait for the other jobs of its sweep; None: at none."""
        ...

    @property
    def problems(self) -> Problems:
        """Where the loop tells what it waits for."""
        ...

    async def kept_groups(self) -> Mapping[int, bytes]:
        """The finished groups, by number, that are kept and not trained yet."""
        ...

    def pause_requested(self) -> bool:
        """Whether to return at the next border between two steps."""
        ...


class Checkpointing(Protocol):
    """Checkpoints for a job's loop: `services/coordinator/checkpoints.py` is one."""

    async def create_checkpoint(
        self, name: str, *, ttl_s: float | None, request_id: str
    ) -> types.Checkpoint:
        """The adapter as its answered ops left it; the same again where the request is repeated."""
        ...

    async def delete_checkpoint(self, name: str, *, request_id: str) -> None:
        """Let it go. NotFound: there is none of that name."""
        ...

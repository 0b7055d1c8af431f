"""A managed job: its spec as a job file says it, its states and its events.

The spec's keys are the fields of JobSpec in protos/ (a test keeps them equal), plus `jsonl`, which
the client replaces by the tasks in that file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from rollmesh.config import Config, read_yaml
from rollmesh.errors import InvalidRequest
from rollmesh.names import ID_PATTERN
from rollmesh.types import LogprobsKind

if TYPE_CHECKING:
    from pathlib import Path

JobState = Literal["PENDING", "RUNNING", "PAUSED", "SUCCEEDED", "FAILED", "CANCELLED"]
FINAL_STATES: frozenset[JobState] = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
MAX_ROLLOUTS_UNDER_WAY = 65_536
"""Of one job: they, and the tasks that wait for them, are in the coordinator's memory."""
Positive = Annotated[FiniteFloat, Field(gt=0)]
NonNegative = Annotated[FiniteFloat, Field(ge=0)]
Decay = Annotated[FiniteFloat, Field(ge=0, lt=1)]


class Task(Config):
    """One row of a dataset."""

    fields: dict[str, str]
    """Values by name; prompt and reference templates take them as {name}."""


class GeneratorSpec(Config):
    """Tasks made by a program that the coordinator knows by name."""

    name: str
    """Name of the generator, e.g. `arithmetic`."""
    parameters: dict[str, Any] = {}
    """Its parameters."""

    @field_validator("parameters")
    @classmethod
    def _whole_numbers(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        return {key: whole_numbers(value) for key, value in parameters.items()}


class DatasetSpec(Config):
    """Where tasks come from: exactly one of `jsonl`, `tasks` and `generator`."""

    jsonl: str | None = None
    """Path of a file of JSON objects, one a line, relative to the job file. Read by the client."""
    tasks: list[Task] = []
    """The tasks themselves."""
    generator: GeneratorSpec | None = None
    """A generator of tasks."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [bool(self.jsonl), bool(self.tasks), self.generator is not None]
        if sum(given) != 1:
            raise ValueError("exactly one of jsonl, tasks (not empty) and generator is needed")
        return self


class AdapterSpec(Config):
    """The LoRA adapter that the job creates and trains."""

    id: str = Field(default="", pattern=rf"^(?:{ID_PATTERN})?$")
    """Id within the project. Empty: the job's id."""
    rank: PositiveInt = 16
    """LoRA rank."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank. Absent: 2 × rank."""
    target_modules: list[str] = []
    """Module names to adapt. Empty: all linear layers but the unembedding."""
    seed: int = 0
    """Seed of the initial weights."""


class ChatMessage(Config):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """Text with {name} for a task's fields; {{ and }} for braces."""


class PromptSpec(Config):
    """How a task becomes a prompt: exactly one of `messages` and `text`."""

    messages: list[ChatMessage] = []
    """A chat, rendered with the base model's chat template and its generation prompt."""
    text: str = ""
    """Plain text with {name} for a task's fields, tokenized as it is."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.messages) == bool(self.text):
            raise ValueError("exactly one of messages and text is needed")
        return self


class RewardSpec(Config):
    """How a completion is scored."""

    function: str
    """Name of a reward function, e.g. `exact_match`."""
    parameters: dict[str, Any] = {}
    """Its parameters."""
    reference: str = ""
    """What the function compares with: text with {name} for a task's fields."""

    @field_validator("parameters")
    @classmethod
    def _whole_numbers(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        return {key: whole_numbers(value) for key, value in parameters.items()}


class LearningRateSpec(Config):
    """The learning rate as a function of the step."""

    peak: Positive = 1e-4
    """The rate after warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from peak to final by stop.max_steps."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate first rises linearly."""
    final: NonNegative = 0.0
    """The rate at the last step; unused by `constant`."""


class AlgorithmSpec(Config):
    """How rewards become training steps."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Advantage estimator; docs/architecture.md gives the formulas."""
    group_size: int = Field(default=8, ge=2, le=1024)
    """Rollouts of one prompt."""
    groups_per_step: int = Field(default=32, gt=0, le=4096)
    """Groups per optimizer step."""
    max_staleness: NonNegativeInt = 0
    """Bound of version trained − version sampled. 0: strictly on-policy."""
    learning_rate: LearningRateSpec = LearningRateSpec()
    """Learning rate over the steps."""
    kl_coefficient: NonNegative = 0.0
    """Coefficient of the KL penalty towards the base policy. 0: off."""
    max_grad_norm: Positive | None = None
    """Gradients are scaled down to this global norm. Absent: never."""
    beta1: Decay = 0.9
    """AdamW's decay of the first moment."""
    beta2: Decay = 0.95
    """AdamW's decay of the second moment."""
    epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""

    @model_validator(mode="after")
    def _rollouts_under_way(self) -> Self:
        under_way = (self.max_staleness + 1) * self.groups_per_step * self.group_size
        if under_way > MAX_ROLLOUTS_UNDER_WAY:
            raise ValueError(
                f"(max_staleness + 1) * groups_per_step * group_size is {under_way:,}; at most "
                f"{MAX_ROLLOUTS_UNDER_WAY:,} rollouts may be under way"
            )
        return self


class SamplingSpec(Config):
    """How completions are drawn. Seeds are derived from the job's."""

    max_tokens: PositiveInt | None = None
    """Most tokens of one completion. Absent: what the context has left."""
    temperature: Annotated[FiniteFloat, Field(gt=0, le=2)] = 1.0
    """Softmax temperature of training samples; evaluation is greedy."""
    top_k: PositiveInt | None = None
    """Draw from the k likeliest tokens only."""
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    """Draw from the smallest set of tokens with this total probability."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=16)
    """Text that ends a completion once generated."""
    min_p: Annotated[FiniteFloat, Field(ge=0, lt=1)] | None = None
    """Draw only from tokens with at least this share of the likeliest one's probability."""
    logprobs_kind: LogprobsKind = "policy"
    """Which log-probabilities are on both sides of the ratio: `policy`, the policy's own, or
    `sampled`, those of the policy at `temperature`. docs/losses.md compares them."""
    continue_on_newest: bool = False
    """Completions under way move to each newer version; staleness counts from their oldest."""
    max_logprob_gap: Positive | None = None
    """Bound, in nats, of the gap between sampler and trainer in a token's log-probability under the
    same version. A sampler beyond it is in quarantine for this job, and its groups that are at hand
    are drawn anew. Costs one forward pass a step. Not compared are groups still under way at the
    optimizer step and tokens of older versions. Absent: the gap is measured, and has no bound."""

    @model_validator(mode="after")
    def _whole_distribution(self) -> Self:
        cuts = {
            "top_k": self.top_k is not None,
            "top_p": (self.top_p or 1.0) < 1,
            "min_p": bool(self.min_p),
        }
        given = [name for name, is_cut in cuts.items() if is_cut]
        if self.logprobs_kind == "sampled" and given:
            raise ValueError(
                f"logprobs_kind 'sampled' goes without {' and '.join(given)}: the trainer computes "
                "the whole distribution at sampling.temperature, not one that is cut off; "
                "'policy' goes with them"
            )
        return self


class StopSpec(Config):
    """When the job has succeeded: whichever comes first."""

    max_steps: PositiveInt
    """After this many optimizer steps."""
    evaluation_reward: FiniteFloat | None = None
    """When an evaluation's mean reward is at least this."""


class EvaluationSpec(Config):
    """Greedy evaluation on held-out tasks: before the first step, every few, after the last."""

    every_steps: PositiveInt | None = None
    """Steps between two evaluations. Absent: only before the first and after the last step."""
    dataset: DatasetSpec
    """The held-out tasks."""
    max_tasks: PositiveInt | None = None
    """Evaluate only the first tasks of the dataset."""


class JobSpec(Config):
    """A managed RL job."""

    base_model: str = Field(min_length=1)
    """Name of the base model, as the fleet serves it."""
    adapter: AdapterSpec = AdapterSpec()
    """The adapter to create and train."""
    dataset: DatasetSpec
    """Where the training tasks come from."""
    prompt: PromptSpec
    """How a task becomes a prompt."""
    reward: RewardSpec
    """How a completion is scored."""
    algorithm: AlgorithmSpec = AlgorithmSpec()
    """How rewards become training steps."""
    sampling: SamplingSpec = SamplingSpec()
    """How completions are drawn."""
    stop: StopSpec
    """When the job has succeeded."""
    evaluation: EvaluationSpec | None = None
    """What to measure on held-out tasks. Absent: nothing."""
    seed: int = 0
    """Seed of everything random in the job."""

    @model_validator(mode="after")
    def _staleness_to_continue(self) -> Self:
        if self.sampling.continue_on_newest and not self.algorithm.max_staleness:
            raise ValueError(
                "sampling.continue_on_newest needs algorithm.max_staleness of at least 1: with 0 "
                "no completion is under way when a newer version comes"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_for_its_stop(self) -> Self:
        if self.stop.evaluation_reward is not None and self.evaluation is None:
            raise ValueError("stop.evaluation_reward needs evaluation")
        return self


def load_job_file(path: Path) -> JobSpec:
    """The job in the YAML file at `path`, its `jsonl` datasets read and put in as tasks.

    Raises:
        InvalidRequest: malformed YAML, an unknown or ill-typed key (with the nearest known one), or
            a dataset line that is not a JSON object (with its number).
    """
    spec = JobSpec.parse(read_yaml(path), source=str(path))
    updates: dict[str, Any] = {"dataset": _inline(spec.dataset, path.parent)}
    if spec.evaluation is not None:
        held_out = _inline(spec.evaluation.dataset, path.parent)
        updates["evaluation"] = spec.evaluation.model_copy(update={"dataset": held_out})
    return spec.model_copy(update=updates)


def _inline(dataset: DatasetSpec, folder: Path) -> DatasetSpec:
    if dataset.jsonl is None:
        return dataset
    return DatasetSpec(tasks=read_jsonl(folder / dataset.jsonl))


def read_jsonl(path: Path) -> list[Task]:
    """The tasks in a file of JSON objects, one a line; blank lines are skipped.

    Raises:
        InvalidRequest: unreadable, empty, or a line that is not an object of plain values.
    """
    try:
        # Not splitlines: JSON text may hold the other characters at which that would break it.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: {error}", field="dataset.jsonl", value=path) from None
    tasks = [_task(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not tasks:
        raise InvalidRequest(f"{path}: no tasks in it", field="dataset.jsonl", value=path)
    return tasks


def _task(line: str, where: str) -> Task:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"{where}: not JSON: {error.msg} at column {error.colno}",
            field="dataset.jsonl",
            value=line[:200],
        ) from None
    if not isinstance(row, dict):
        raise InvalidRequest(
            f"{where}: a JSON object is needed, found {type(row).__name__}",
            field="dataset.jsonl",
            value=line[:200],
        )
    fields: dict[str, str] = {}
    for key, value in row.items():
        if not isinstance(value, str | int | float | bool):
            raise InvalidRequest(
                f"{where}: {key!r} must be text, a number or a boolean",
                field="dataset.jsonl",
                value=str(value)[:200],
            )
        fields[key] = value if isinstance(value, str) else json.dumps(value)
    return Task(fields=fields)


def whole_numbers(value: Any) -> Any:
    """`value` with whole floats as ints again: a protobuf Struct knows floats only."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole_numbers(inner) for inner in value]
    return value


class StateChanged(Config):
    """The job moved to another state."""

    kind: Literal["state_changed"] = "state_changed"
    """Tells the events apart."""
    from_state: JobState | None
    """None for a new job."""
    to_state: JobState
    """The state it is in now."""
    reason: str = ""
    """Why."""


class StepCompleted(Config):
    """An optimizer step was finished and its policy is live. protos/ lists metrics and phases."""

    kind: Literal["step_completed"] = "step_completed"
    """Tells the events apart."""
    step: PositiveInt
    """Number of the step, from 1."""
    policy_version: NonNegativeInt
    """The adapter's version after it."""
    metrics: dict[str, float]
    """By name."""
    phases: dict[str, float]
    """Seconds by phase."""


class EvaluationCompleted(Config):
    """An evaluation was finished."""

    kind: Literal["evaluation_completed"] = "evaluation_completed"
    """Tells the events apart."""
    step: NonNegativeInt
    """Optimizer steps before it."""
    reward_mean: float
    """Mean reward of the greedy completions."""
    num_tasks: int
    """Tasks evaluated."""
    duration_s: float
    """Wall time in seconds."""


class Warned(Config):
    """Something went wrong that the job survived."""

    kind: Literal["warning"] = "warning"
    """Tells the events apart."""
    reason: str
    """Stable name: STEP_RECOVERED, TRAINER_UNAVAILABLE, REWARD_UNAVAILABLE, SAMPLER_UNAVAILABLE,
    LOGPROB_GAP."""
    message: str
    """For a person to read."""


Happening = Annotated[
    StateChanged | StepCompleted | EvaluationCompleted | Warned, Field(discriminator="kind")
]


class JobEvent(Config):
    """Something that happened to a job."""

    number: PositiveInt
    """From 1, without gaps."""
    time: float
    """Unix seconds."""
    event: Happening
    """What happened."""


class Job(Config):
    """A managed job as the coordinator tells it."""

    name: str
    """`projects/{p}/jobs/{j}`."""
    spec: JobSpec
    """What it was created with."""
    state: JobState
    """Where it is in its life."""
    state_reason: str = ""
    """Why it is there."""
    create_time: float
    """Unix seconds."""
    update_time: float
    """Unix seconds."""
    adapter: str = ""
    """`projects/{p}/adapters/{a}`; empty: not created yet."""
    step: NonNegativeInt = 0
    """Optimizer steps finished."""
    metrics: dict[str, float] = {}
    """Of the newest finished step."""
    first_evaluation: EvaluationCompleted | None = None
    """The first evaluation."""
    last_evaluation: EvaluationCompleted | None = None
    """The newest evaluation."""
    last_event: NonNegativeInt = 0
    """Number of its newest event."""

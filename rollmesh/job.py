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
    ValidationInfo,
    field_validator,
    model_validator,
)

from rollmesh.config import Config, read_yaml
from rollmesh.errors import InvalidRequest
from rollmesh.names import ID_PATTERN
from rollmesh.types import CLIP_RANGES, LogprobsKind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

JobState = Literal["PENDING", "RUNNING", "PAUSED", "SUCCEEDED", "FAILED", "CANCELLED"]
FINAL_STATES: frozenset[JobState] = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
MAX_ROLLOUTS_UNDER_WAY = 65_536
"""Of one job: they, and the tasks that wait for them, are in the coordinator's memory."""
Priority = Literal["low", "normal", "high"]
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
    """Where tasks come from: exactly one of `jsonl`, `tasks`, `generator` and `split`."""

    jsonl: str | None = None
    """Path of a file of JSON objects, one a line, relative to the job file. Read by the client."""
    tasks: list[Task] = []
    """The tasks themselves."""
    generator: GeneratorSpec | None = None
    """A generator of tasks."""
    split: str = ""
    """A split of the job's environment, of which the first 100,000 tasks are taken."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [bool(self.jsonl), bool(self.tasks), self.generator is not None, bool(self.split)]
        if sum(given) != 1:
            raise ValueError(
                "exactly one of jsonl, tasks (not empty), generator and split is needed"
            )
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

    function: str = ""
    """Name of a reward function, e.g. `exact_match`. Exactly one of this and `environment`."""
    parameters: dict[str, Any] = {}
    """Its parameters."""
    reference: str = ""
    """What the function compares with: text with {name} for a task's fields."""
    environment: str = ""
    """Name of an environment that scores completions of the job's own tasks in a single turn: it is
    told the task's fields, the chat and the completion. Needs prompt.messages."""

    @model_validator(mode="after")
    def _one_scorer(self) -> Self:
        if bool(self.function) == bool(self.environment):
            raise ValueError("exactly one of function and environment is needed")
        if self.environment and (self.parameters or self.reference):
            raise ValueError("parameters and reference are a function's, not an environment's")
        return self

    @field_validator("parameters")
    @classmethod
    def _whole_numbers(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        return {key: whole_numbers(value) for key, value in parameters.items()}


class EnvironmentSpec(Config):
    """What rollouts take place in: episodes where it has them, else single turns."""

    name: str = Field(pattern=rf"^{ID_PATTERN}$")
    """Its name, as `rollmesh environment list` tells it."""
    max_turns: PositiveInt = 16
    """Most completions of one rollout; after them it is worth what it got so far."""
    max_retries: NonNegativeInt = 2
    """How often a rollout is begun anew when the environment failed or took too long. While it is
    away the job waits, which does not count."""
    max_failures: NonNegativeInt = 16
    """Rollouts that may be given up so, over the whole job: each has its group replaced by one of
    another task. One more fails the job."""


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


def _bounds_of_ratio(algorithm: Mapping[str, Any]) -> tuple[float, float]:
    """As the trainer has them, of what is known so far; without clipping they bound nothing."""
    given = algorithm.get("clip_low_threshold"), algorithm.get("clip_high_threshold")
    own = CLIP_RANGES.get(algorithm.get("loss", ""), (0.0, 0.0))
    low, high = (mine if mine is not None else its for mine, its in zip(given, own, strict=True))
    return low, high


class AlgorithmSpec(Config):
    """How rewards become training steps."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"
    """Advantage estimator; docs/losses.md gives the formulas."""
    group_size: int = Field(default=8, ge=2, le=1024)
    """Rollouts of one prompt. Without meaning with `sft`, as `advantage` is."""
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
    loss: Literal["importance_sampling", "ppo", "cispo", "gspo", "stable_reinforce"] = (
        "importance_sampling"
    )
    """The loss; docs/losses.md gives the formulas."""
    clip_low_threshold: NonNegative | None = None
    """Lower bound of the ratio itself for ppo, cispo and gspo, not a distance from 1. Absent: the
    loss's own."""
    clip_high_threshold: Annotated[Positive | None, Field(validate_default=True)] = None
    """Upper bound of the ratio for ppo, cispo and gspo, at least the lower one: 1.28 beside 0.8 is
    DAPO's "clip higher". Absent: the loss's own."""
    max_importance_ratio: Positive | None = None
    """Tokens whose ratio is above it count with it; at least the upper bound of the ratio, with
    stable_reinforce at least 1. Not with cispo. Absent: 2 for stable_reinforce, else no bound."""
    max_group_replacements: int = Field(default=0, ge=0, le=100)
    """Dynamic sampling: how often, for each group of a step, one whose rewards are all equal is
    replaced by a group of another task. The last is kept as it is. 0: never."""

    @field_validator("clip_low_threshold", "clip_high_threshold")
    @classmethod
    def _clips(cls, value: float | None, info: ValidationInfo) -> float | None:
        loss = info.data.get("loss")
        if value is not None and loss not in CLIP_RANGES:
            raise ValueError(f"goes with the losses {', '.join(CLIP_RANGES)}, not with {loss}")
        return value

    @field_validator("clip_high_threshold")
    @classmethod
    def _above_the_lower_bound(cls, high: float | None, info: ValidationInfo) -> float | None:
        low, bound = _bounds_of_ratio(info.data | {"clip_high_threshold": high})
        if low > bound:
            raise ValueError(f"{bound:g} is below clip_low_threshold, which is {low:g}")
        return high

    @field_validator("max_importance_ratio")
    @classmethod
    def _above_the_upper_bound(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None:
            return None
        if info.data.get("loss") == "cispo":
            raise ValueError("not with cispo, whose clip_high_threshold is that bound")
        _, high = _bounds_of_ratio(info.data)
        if info.data.get("loss") == "stable_reinforce" and value < 1:
            raise ValueError(f"{value:g} is below 1, with stable_reinforce it is at least that")
        if value < high:
            raise ValueError(f"{value:g} is below the ratio's upper bound, which is {high:g}")
        return value


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
    patience: PositiveInt | None = None
    """When so many evaluations in a row were no better than the best before them."""
    min_improvement: NonNegative = 0.0
    """By how much an evaluation has to be better to count for `patience` and as the best."""


class EvaluationSetSpec(Config):
    """A further set of held-out tasks."""

    name: str = Field(pattern=rf"^{ID_PATTERN}$")
    """What its evaluations are told by."""
    dataset: DatasetSpec
    """The tasks."""
    max_tasks: PositiveInt | None = None
    """Evaluate only the first tasks of the dataset."""


class EvaluationSpec(Config):
    """Greedy evaluation on held-out tasks: before the first step, every few, after the last."""

    every_steps: PositiveInt | None = None
    """Steps between two evaluations. Absent: only before the first and after the last step."""
    dataset: DatasetSpec
    """The held-out tasks."""
    max_tasks: PositiveInt | None = None
    """Evaluate only the first tasks of the dataset."""
    sets: list[EvaluationSetSpec] = Field(default=[], max_length=16)
    """Further sets, measured at the same steps. `stop`, the best checkpoint and sweeps go by
    `dataset` alone."""
    keep_best: bool = False
    """Keep the weights of the best evaluation as a checkpoint of the adapter, named
    `best-{step}`."""

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [one.name for one in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"sets: each name once, not {', '.join(names)}")
        return self

    @property
    def datasets(self) -> list[DatasetSpec]:
        """Of all sets."""
        return [self.dataset, *(one.dataset for one in self.sets)]


class DistillationSpec(Config):
    """On-policy distillation: the teacher judges every token that the student draws.

    Its advantage is coefficient × (log-probability by the teacher − by the student), beside that of
    its reward where the job has one.
    """

    teacher_adapter: str = ""
    """`projects/{p}/adapters/{a}` of the same project, on the same base model. Empty: a base
    model."""
    teacher_version: NonNegativeInt | None = None
    """Its version, kept until the job has ended. Absent: the newest when the job is created."""
    teacher_base_model: str = ""
    """A base model with the same tokenizer. Empty: the job's own. Not with teacher_adapter."""
    coefficient: Positive = 1.0
    """Weight of the teacher."""

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.teacher_adapter and self.teacher_base_model:
            raise ValueError("at most one of teacher_adapter and teacher_base_model may be given")
        if self.teacher_version is not None and not self.teacher_adapter:
            raise ValueError("teacher_version needs teacher_adapter")
        return self


class SftSpec(Config):
    """Supervised fine-tuning: cross-entropy of given completions, averaged over their tokens."""

    completion: str = Field(min_length=1)
    """The completion to learn, text with {name} for a task's fields. It is ended as the chat
    template ends an assistant's turn, after prompt.text by the end of sequence."""


class CurriculumSpec(Config):
    """Tasks whose last mean reward lies within the bounds, and new ones, go before others."""

    min_reward: FiniteFloat | None = None
    """Tasks below it are too hard for now."""
    max_reward: FiniteFloat | None = None
    """Tasks above it are learned."""
    revisit: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.1
    """Share of the groups that are drawn from the tasks outside of the bounds."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_reward is None and self.max_reward is None:
            raise ValueError("at least one of min_reward and max_reward is needed")
        if None not in (self.min_reward, self.max_reward) and self.min_reward > self.max_reward:  # type: ignore[operator]
            raise ValueError("min_reward must not be above max_reward")
        return self


class JobSpec(Config):
    """A managed RL job."""

    base_model: str = Field(min_length=1)
    """Name of the base model, as the fleet serves it."""
    adapter: AdapterSpec = AdapterSpec()
    """The adapter to create and train."""
    dataset: DatasetSpec
    """Where the training tasks come from."""
    prompt: PromptSpec | None = None
    """How a task becomes a prompt. Absent with `environment`, and only then."""
    reward: RewardSpec | None = None
    """How a completion is scored. May be absent with `sft` and `distillation`; absent with
    `environment`."""
    sft: SftSpec | None = None
    """Supervised fine-tuning instead of reinforcement learning: nothing is sampled but in
    evaluations."""
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
    priority: Priority = "normal"
    """Requests of a higher class go before all of a lower one, and take their places at the border
    of a chunk. At most the project's max_priority."""
    distillation: DistillationSpec | None = None
    """Teach the policy what another one would say of its own completions."""
    curriculum: CurriculumSpec | None = None
    """Draw tasks by how the policy does on them. Absent: every epoch goes through all of them."""
    environment: EnvironmentSpec | None = None
    """An environment that has the tasks, says what there is to see, and scores. Without `prompt`,
    `reward` and `sft`. Absent: single turns, of the job's own tasks."""

    @field_validator("algorithm")
    @classmethod
    def _rollouts_under_way(cls, algorithm: AlgorithmSpec, info: ValidationInfo) -> AlgorithmSpec:
        factors = "(max_staleness + 1) * groups_per_step"
        under_way = (algorithm.max_staleness + 1) * algorithm.groups_per_step
        if info.data.get("sft") is None:
            factors += " * group_size"
            under_way *= algorithm.group_size
        if under_way > MAX_ROLLOUTS_UNDER_WAY:
            raise ValueError(
                f"{factors} is {under_way:,}; at most {MAX_ROLLOUTS_UNDER_WAY:,} rollouts may be "
                "under way"
            )
        return algorithm

    @model_validator(mode="after")
    def _method(self) -> Self:
        if self.sft and self.distillation:
            raise ValueError("at most one of sft and distillation may be given")
        if not (self.is_rewarded or self.sft or self.distillation):
            raise ValueError("reward is needed, but with environment, sft or distillation")
        if not self.is_rewarded and (self.evaluation or self.curriculum):
            raise ValueError("evaluation and curriculum need reward or environment")
        if not self.is_rewarded and self.algorithm.max_group_replacements:
            raise ValueError("algorithm.max_group_replacements needs reward or environment")
        if self.sft and (self.curriculum or self.algorithm.max_group_replacements):
            raise ValueError("sft draws nothing: without curriculum and max_group_replacements")
        return self

    @model_validator(mode="after")
    def _tasks_and_prompts(self) -> Self:
        sets = self.evaluation.datasets if self.evaluation else []
        splits = [bool(dataset.split) for dataset in (self.dataset, *sets)]
        if self.environment is None:
            if self.prompt is None:
                raise ValueError("prompt is needed, but with environment")
            if any(splits):
                raise ValueError("a split is one of an environment's, and there is none")
            if self.reward and self.reward.environment and not self.prompt.messages:
                raise ValueError("reward.environment reads chats: it needs prompt.messages")
            return self
        if not all(splits):
            raise ValueError("with environment each dataset is a split of it")
        beside = {"prompt": self.prompt, "reward": self.reward, "sft": self.sft}
        given = [name for name, section in beside.items() if section is not None]
        if given:
            raise ValueError(
                f"environment says what there is to see and scores: without {', '.join(given)}"
            )
        return self

    @model_validator(mode="after")
    def _of_cross_entropy(self) -> Self:
        algorithm = self.algorithm
        beside = {
            "algorithm.loss": algorithm.loss != "importance_sampling",
            "algorithm.max_importance_ratio": algorithm.max_importance_ratio is not None,
            "sampling.max_logprob_gap": self.sampling.max_logprob_gap is not None,
        }
        given = [name for name, is_given in beside.items() if is_given]
        if self.sft and given:
            raise ValueError(
                f"sft trains by cross-entropy, on nothing sampled: without {', '.join(given)}"
            )
        return self

    @model_validator(mode="after")
    def _comparable_with_the_teacher(self) -> Self:
        sampling = self.sampling
        if self.distillation and sampling.logprobs_kind == "sampled" and sampling.temperature != 1:
            raise ValueError(
                "distillation: the teacher's log-probabilities are at temperature 1; with another "
                "sampling.temperature sampling.logprobs_kind must be 'policy'"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_for_patience(self) -> Self:
        evaluated = self.evaluation is not None and self.evaluation.every_steps is not None
        if self.stop.patience is not None and not evaluated:
            raise ValueError("stop.patience needs evaluation.every_steps")
        return self

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

    @property
    def is_rewarded(self) -> bool:
        """Whether anything says what its rollouts are worth."""
        return self.reward is not None or self.environment is not None

    @property
    def needs_sampler(self) -> bool:
        """Whether anything is drawn for it, ever."""
        return self.sft is None or self.evaluation is not None


def load_job_file(path: Path) -> JobSpec:
    """The job in the YAML file at `path`, its `jsonl` datasets read and put in as tasks.

    Raises:
        InvalidRequest: malformed YAML, an unknown or ill-typed key (with the nearest known one), or
            a dataset line that is not a JSON object (with its number).
    """
    return inline_datasets(JobSpec.parse(read_yaml(path), source=str(path)), path.parent)


def inline_datasets(spec: JobSpec, folder: Path) -> JobSpec:
    """`spec` with the tasks of its `jsonl` datasets, whose paths are relative to `folder`, put in.

    Raises:
        InvalidRequest: as load_job_file of a dataset.
    """
    updates: dict[str, Any] = {"dataset": _inline(spec.dataset, folder)}
    if spec.evaluation is not None:
        held_out = _inline(spec.evaluation.dataset, folder)
        sets = [
            one.model_copy(update={"dataset": _inline(one.dataset, folder)})
            for one in spec.evaluation.sets
        ]
        updates["evaluation"] = spec.evaluation.model_copy(
            update={"dataset": held_out, "sets": sets}
        )
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
    set: str = ""
    """Name in evaluation.sets; empty: evaluation.dataset."""


class Warned(Config):
    """Something went wrong that the job survived."""

    kind: Literal["warning"] = "warning"
    """Tells the events apart."""
    reason: str
    """Stable name: STEP_RECOVERED, TRAINER_UNAVAILABLE, REWARD_UNAVAILABLE, SAMPLER_UNAVAILABLE,
    ENVIRONMENT_UNAVAILABLE, ENVIRONMENT_FAILED, ENVIRONMENT_CHANGED, LOGPROB_GAP,
    CHECKPOINT_FAILED."""
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


class QueueStatus(Config):
    """Where a waiting job stands."""

    position: PositiveInt
    """From 1, among all jobs that wait for the same thing."""
    rule: str
    """What holds it back, as ExplainSchedule names it."""
    reason: str
    """The same for a person to read."""
    eta_low_s: float | None = None
    """Seconds until it may begin at the earliest; None with eta_high_s: nothing to go by."""
    eta_high_s: float | None = None
    """And at the latest, if what runs goes on as it has."""


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
    queue: QueueStatus | None = None
    """Why it waits, if it is PENDING."""
    best_evaluation: EvaluationCompleted | None = None
    """The best evaluation of evaluation.dataset."""
    best_checkpoint: str = ""
    """Resource name of the checkpoint with its weights; empty: none is kept."""
    sweep: str = ""
    """`projects/{p}/sweeps/{s}` that made it; empty: none."""
    problems: list[str] = []
    """What it waits for, while it runs, because that is away."""

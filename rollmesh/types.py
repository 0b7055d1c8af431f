"""The values that services exchange, as plain immutable Python: what cores and users work with.

`rollmesh.convert` maps them to and from protobuf. Their meaning, units and defaults are those of
the messages of the same name in protos/.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]
    IntArray = NDArray[np.int32]

LossName = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"
]
StopReason = Literal["stop", "length"]
MemberRole = Literal["trainer", "sampler", "reward", "environment"]
LogprobsKind = Literal["policy", "sampled"]

CLIP_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0), "gspo": (0.9997, 1.0004)}
)
"""Bounds of the ratio, by loss, where a LossConfig has none: of PPO 1 ± ε with ε = 0.2
(arXiv:1707.06347), of GSPO 1 − 3e-4 and 1 + 4e-4 (arXiv:2507.18071, section 5.1)."""

HEARTBEAT_S = 0.25
"""Longest pause in a sampler's stream: without tokens a sign of life comes."""
SILENCE_S = 1.5
"""A sampler's stream that brings nothing for so long is lost."""

BASE_VERSION = -1
"""policy_version in a span of tokens that the base model produced without an adapter."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Shape of a LoRA adapter. `alpha` None: 2 × rank. No target_modules: all but unembedding."""

    rank: int
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """A base model, and unless empty one version of one adapter on it (None: the newest)."""

    base_model: str = ""
    adapter: str = ""
    policy_version: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One published version of an adapter, its digest, and the trainer that has it."""

    adapter: str
    policy_version: int
    digest: str
    trainer_address: str = ""
    export_key: str = ""


@dataclass(frozen=True, slots=True)
class PolicySpan:
    """Which policy produced a run of `num_tokens` tokens. BASE_VERSION and "": the base model.

    `sampler`: instance_id of the sampler that drew them.
    """

    num_tokens: int
    policy_version: int
    digest: str
    sampler: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw completions; None: the default that protos/ names."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None
    regex: str | None = None
    logprobs_kind: LogprobsKind = "policy"
    prompt_logprobs: int | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of a prompt of T tokens: their logprobs [T], and at each position the k likeliest [T][k].

    Nothing predicts the first token: its logprob is NaN, its row of top_token_ids -1 and of
    top_logprobs NaN.
    """

    logprobs: tuple[float, ...]
    top_token_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """A completion to draw: which of a request's, and the tokens that it has already."""

    index: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """A piece of completion `index`: token_ids, as many logprobs, and spans over them.

    prompt_logprobs, where they are asked for, come with one chunk of the request. top_token_ids and
    top_logprobs, where they are asked for, have a row of the k likeliest for each token; where
    fewer can be drawn the rest is -1, with -inf.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[PolicySpan, ...]
    stop_reason: StopReason | None = None
    prompt_logprobs: PromptLogprobs | None = None
    top_token_ids: tuple[tuple[int, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole completion: chunks of the same index put together, adjacent equal spans merged."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[PolicySpan, ...]
    stop_reason: StopReason
    prompt_logprobs: PromptLogprobs | None = None
    top_token_ids: tuple[tuple[int, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()


def join_chunks(chunks: Sequence[CompletionChunk]) -> Completion:
    """The completion that `chunks` make up: of one index, in order, the last with a stop_reason."""
    stop_reason = chunks[-1].stop_reason
    assert stop_reason is not None  # noqa: S101 - a stream that ends without one is an error earlier
    spans: list[PolicySpan] = []
    for span in (span for chunk in chunks for span in chunk.spans):
        merged = PolicySpan(
            spans[-1].num_tokens + span.num_tokens if spans else 0,
            span.policy_version,
            span.digest,
            span.sampler,
        )
        if spans and replace(merged, num_tokens=spans[-1].num_tokens) == spans[-1]:
            spans[-1] = merged
        else:
            spans.append(span)
    return Completion(
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        spans=tuple(spans),
        stop_reason=stop_reason,
        prompt_logprobs=next((c.prompt_logprobs for c in chunks if c.prompt_logprobs), None),
        top_token_ids=tuple(row for chunk in chunks for row in chunk.top_token_ids),
        top_logprobs=tuple(row for chunk in chunks for row in chunk.top_logprobs),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """One training sequence of T positions; every array has shape [T].

    token_ids, target_token_ids: int32. weights, sampling_logprobs, advantages: float32 or None.
    sequence_ids: int32, -1 for none; or None: the datum is one sampled sequence.
    """

    token_ids: IntArray
    target_token_ids: IntArray
    weights: FloatArray | None = None
    sampling_logprobs: FloatArray | None = None
    advantages: FloatArray | None = None
    sequence_ids: IntArray | None = None


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What a ForwardBackward minimises; None: the loss's default, or the option is off.

    A field that `loss` does not take must be None. kl_coefficient None: no KL to the base is
    computed, max_importance_ratio None: ratios are not truncated, but those of stable_reinforce.
    """

    loss: LossName
    kl_coefficient: float | None = None
    clip_low_threshold: float | None = None
    clip_high_threshold: float | None = None
    beta: float | None = None
    max_importance_ratio: float | None = None
    entropy: bool = False
    temperature: float | None = None
    max_sequence_ratio: float | None = None
    sampler_kl_coefficient: float | None = None


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """One AdamW step over one adapter. max_grad_norm None: no clipping."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBackwardResult:
    """Per datum the targets' logprobs, float32 [T], and metrics by name."""

    logprobs: tuple[FloatArray, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardResult:
    """Per datum the targets' logprobs, float32 [T]; of a loss, where it was asked for, metrics."""

    logprobs: tuple[FloatArray, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OptimStepResult:
    """The adapter's version after the step, and metrics by name."""

    policy_version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """A version that can be exported and sampled, and where its blob is ("": nowhere)."""

    policy_version: int
    digest: str
    export_key: str = ""


@dataclass(frozen=True, slots=True)
class AdapterExport:
    """What a transfer of one adapter version holds, without its tensors."""

    adapter: str
    policy_version: int
    base_model: str
    adapter_config_json: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TrainerAdapter:
    """An adapter as its trainer holds it, under `epoch`; `lora` has its defaults filled in."""

    name: str
    lora: LoraConfig
    policy_version: int
    next_sequence: int
    has_pending_gradients: bool
    epoch: int = 1


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """That a trainer holds an adapter, and under which epoch."""

    name: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where an adapter's state lies in the blob store, and what it must be."""

    key: str
    digest: str
    next_sequence: int
    policy_version: int
    num_bytes: int
    weights_digest: str


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBackward:
    """A training op: loss and gradients of a batch."""

    data: Sequence[Datum]
    loss_config: LossConfig


@dataclass(frozen=True, slots=True)
class OptimStep:
    """A training op: one AdamW step."""

    adam: AdamConfig


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """A training op: other weights, and on demand the optimizer state that belongs to them."""

    snapshot: Snapshot
    with_optimizer: bool


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The adapter's version after a LoadSnapshot."""

    policy_version: int


TrainingOp: TypeAlias = "ForwardBackward | OptimStep | LoadSnapshot"
TrainingResult: TypeAlias = "ForwardBackwardResult | OptimStepResult | LoadResult"


@dataclass(frozen=True, slots=True)
class TrainerInfo:
    """What a trainer serves and how full it is."""

    base_model: str
    vocab_size: int
    max_length: int
    max_rank: int
    num_adapters: int
    max_adapters: int
    target_modules: tuple[str, ...]
    kept_versions: int
    instance_id: str = ""
    draining: bool = False
    held: tuple[HeldAdapter, ...] = ()
    adapter_bytes: int = 0
    max_adapter_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SamplerInfo:
    """What a sampler serves and how busy it is."""

    base_model: str
    vocab_size: int
    max_length: int
    backend: str
    num_running: int
    loaded: tuple[AdapterSource, ...]
    max_rank: int
    instance_id: str = ""
    num_queued: int = 0
    max_loras: int = 0
    resident: tuple[AdapterSource, ...] = ()
    kv_tokens: int = 0
    reserved_kv_tokens: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A hold on one version of an adapter. `expire_time`: Unix seconds."""

    name: str
    adapter: str
    policy_version: int
    digest: str
    expire_time: float


@dataclass(frozen=True, slots=True)
class Record:
    """A small document of a project. Times: Unix seconds. `expire_time` None: it is kept."""

    key: str
    value: bytes
    revision: int
    create_time: float
    expire_time: float | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A secret of a project, without the secret; `prefix` is how it begins.

    `create_time`: Unix seconds.
    """

    name: str
    note: str
    prefix: str
    create_time: float


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds that making a version live took; 0 where nothing was to do."""

    pull_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One completion to score."""

    completion: str
    reference: str = ""
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """Completions to score with one function."""

    function: str
    parameters: Mapping[str, Any]
    items: Sequence[ScoreItem]


@dataclass(frozen=True, slots=True)
class RewardFunctionInfo:
    """A reward function as ListFunctions tells it."""

    name: str
    description: str
    parameters_schema_json: str
    asks_judge: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """A trainable policy as the coordinator knows it. `create_time`: Unix seconds."""

    name: str
    base_model: str
    lora: LoraConfig
    policy_version: int
    published_version: int | None
    published_digest: str
    next_sequence: int
    create_time: float
    job: str = ""
    idle_ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter kept as it was. Times: Unix seconds; expire_time None: kept until deleted."""

    name: str
    base_model: str
    lora: LoraConfig
    policy_version: int
    digest: str
    num_bytes: int
    create_time: float
    expire_time: float | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """One process of the mesh as the coordinator sees it. `update_time`: Unix seconds.

    `problem`: why it is not serving; of one that serves, "draining" where it is given nothing more,
    or what some job holds against it.
    """

    role: MemberRole
    address: str
    serving: bool
    base_model: str = ""
    problem: str = ""
    num_adapters: int = 0
    num_running: int = 0
    update_time: float = 0.0
    backend: str = ""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The coordinator's members, and the sample requests that wait in it."""

    members: tuple[Member, ...] = field(default=())
    num_queued_requests: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job or sample request that waits. The proto of ExplainSchedule lists the rules.

    `subject`: `projects/{p}/jobs/{j}` or `projects/{p}/requests/{r}`. `position` from 1; `ahead`:
    subjects of its own project that go before it, nearest first, 10 at most. `since`: Unix seconds.
    `job`: that a request is for, or empty.
    """

    subject: str
    rule: str
    reason: str
    release: str
    position: int
    since: float
    ahead: tuple[str, ...] = ()
    job: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the scheduler did with a subject, and why. `time`: Unix seconds."""

    time: float
    subject: str
    action: Literal["ASSIGNED", "PREEMPTED", "STARTED", "REFUSED"]
    reason: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """A project's part of one base model; `entitled`: of the weights of all who are active there.

    `virtual_tokens`: priced tokens that it was served, over its weight.
    """

    base_model: str
    weight: float
    virtual_tokens: float
    num_queued: int
    num_running: int
    entitled: float


@dataclass(frozen=True, slots=True)
class Quota:
    """A bound on what a project may use; None: no bound."""

    name: Literal["running_jobs", "adapters", "tokens_in_flight", "tokens_per_day"]
    used: int
    allowed: int | None


@dataclass(frozen=True, slots=True)
class Schedule:
    """What ExplainSchedule answers of one project."""

    waiting: tuple[Waiting, ...] = ()
    num_waiting: int = 0
    decisions: tuple[Decision, ...] = ()
    shares: tuple[Share, ...] = ()
    quotas: tuple[Quota, ...] = ()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probability of each token of a sequence (the first: NaN), and the policy behind them."""

    logprobs: tuple[float, ...]
    span: PolicySpan

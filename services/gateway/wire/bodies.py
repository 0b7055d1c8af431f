"""The JSON bodies that the SDK sends.

Fields beyond these are let pass: newer SDKs may have some.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

from rollmesh.config import explain
from services.gateway.wire.ids import MAX_NUMBER, MAX_SEQ

BodyT = TypeVar("BodyT", bound=BaseModel)


def parse(model: type[BodyT], body: bytes) -> BodyT:
    """`body` as JSON of this form.

    Raises:
        InvalidRequest: it is not; the message names the field.
    """
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise explain(error, model, source="body") from None


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    json.dumps(value, allow_nan=False)  # ValueError: NaN or infinity, which no answer could have
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_finite)]
Labels = dict[str, str]
Text = Annotated[str, Field(max_length=1024)]
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Seq = Annotated[int, Field(ge=1, le=MAX_SEQ)]
Ttl = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)]


class Body(BaseModel):
    """Base of every body."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


class CreateSession(Body):
    """POST create_session."""

    tags: list[Text] = Field([], max_length=100)
    user_metadata: Metadata | None = None
    sdk_version: Text = ""
    project_id: Text | None = None
    display_name: Text | None = None


class OfSession(Body):
    """POST session_heartbeat."""

    session_id: Text


class FinishReason(Body):
    """How a session ended."""

    type: Literal["success", "errored", "interrupted"]


class Finish(Body):
    """POST sessions/{id}/finish."""

    reason: FinishReason
    detail: Annotated[str, Field(max_length=10_000)] | None = None


class Lora(Body):
    """LoraConfig."""

    rank: int = 32
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(Body):
    """OptimizerConfig."""

    type: Text = "adamw"


class CreateModel(Body):
    """POST create_model."""

    session_id: Text
    model_seq_id: Number
    base_model: Text
    user_metadata: Metadata | None = None
    lora_config: Lora | None = None
    optimizer_config: Optimizer = Optimizer()


class OfModel(Body):
    """POST get_info."""

    model_id: Text


class LoadWeights(Body):
    """POST load_weights: into a new model (session_id, model_seq_id), or one that there is."""

    session_id: Text | None = None
    model_seq_id: Number | None = None
    base_model: Text | None = None
    user_metadata: Metadata | None = None
    optimizer_config: Optimizer | None = None
    model_id: Text | None = None
    seq_id: Seq | None = None
    path: Text
    optimizer: bool


class PlaceOfLoad(Body):
    """Which of the two forms a load_weights has."""

    model_id: Text | None = None


class Sequenced(Body):
    """What every request has that takes a place among a model's."""

    model_id: Text
    seq_id: Seq


class Adam(Body):
    """AdamParams."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Sequenced):
    """POST optim_step."""

    adam_params: Adam | None = None
    optimizer_params: Metadata | None = None


class SaveWeights(Sequenced):
    """POST save_weights."""

    path: str | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Labels | None = None


class SaveForSampler(Sequenced):
    """POST save_weights_for_sampler; without `path` it is one sampling session's alone."""

    path: str | None = None
    sampling_session_seq_id: Number | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl | None = None
    user_metadata: Labels | None = None


class SaveExternal(Sequenced):
    """POST save_weights_external."""

    path: str
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: list[Annotated[str, Field(max_length=4096)]] | None = Field(
        None, max_length=10
    )


class CreateSampler(Body):
    """POST create_sampling_session."""

    session_id: Text
    sampling_session_seq_id: Number
    base_model: Text | None = None
    model_path: Text | None = None


class OfSampler(Body):
    """POST join_sampling_session."""

    sampling_session_id: Text


class Retrieve(Body):
    """POST retrieve_future, and cancel_future."""

    request_id: Annotated[str, Field(max_length=8192)]
    allow_metadata_only: bool = False


class Target(Body):
    """Whose futures retrieve_futures asks for."""

    type: Literal["sampling_session"]
    sampling_session_id: Text
    cloned_sampler_id: Annotated[int, Field(ge=0, le=10**10)]


class RetrieveMany(Body):
    """POST retrieve_futures. `timeout`: seconds."""

    target: Target
    prev_cursor: Annotated[int, Field(ge=0, lt=2**63)] = 0
    timeout: Annotated[float, Field(ge=0)] | None = None
    retrieved_request_ids: list[str] = []


class OfPath(Body):
    """POST weights_info."""

    tinker_path: Text


class CopyWeights(Body):
    """POST copy_weights."""

    source_path: Text
    ttl_seconds: Ttl | None = None
    destination_project_id: Text | None = None
    session_id: Text | None = None
    model_seq_id: Number | None = None


class SetTtl(Body):
    """PUT …/ttl."""

    ttl_seconds: Ttl | None


class OfProject(Body):
    """PUT sessions/{id}/project."""

    project_id: Text


class Owner(Body):
    """Whose sessions to search."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[Text] = Field([], max_length=10)


class StatusQuery(Body):
    """Which sessions to search."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None


class SearchCursor(Body):
    """Where the next page of a search begins."""

    last_created_at: AwareDatetime
    last_session_id: Text


class SearchSessions(Body):
    """POST sessions/search."""

    session_id: Text | None = None
    project_ids: list[Text] | None = Field(None, max_length=100)
    user_metadata: Labels = {}
    display_name: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    owner: Owner = Owner(type="own", owner_urns=[])
    statuses: list[StatusQuery] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None

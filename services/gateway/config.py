"""Configuration of the gateway."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveInt,
    model_validator,
)

from rollmesh.config import Address, Config, check_peer_address
from rollmesh.telemetry import TelemetryConfig
from services.gateway.openai.config import OpenAiConfig


def _check_coordinators(addresses: str) -> str:
    for address in addresses.split(","):
        check_peer_address(address.strip())
    return addresses


class ServedModel(Config):
    """A base model whose tokenizer does not lie where its name says."""

    name: str = Field(min_length=1)
    """As trainers and samplers say it."""
    tokenizer: str = ""
    """Folder or hub id that the SDK, on its own machine, and the endpoints below /v1 load the
    tokenizer from. Empty: the name."""
    max_context_length: PositiveInt | None = None
    """Tokens of a prompt and what is drawn after it, as get_server_capabilities tells it."""


class ClientConfig(Config):
    """What the SDK does, as POST client/config tells it."""

    sample_use_retrieve_futures: bool = False
    """One poll for all samples of a sampling client, which then needs few connections. Samples that
    are lost with the coordinator are noticed late."""
    sample_join_sampling_session: bool = True
    """Copies of a sampling client in other processes ask for a number of their own."""
    sample_max_concurrent_requests: PositiveInt = 2000
    """Samples that one client has under way at once."""
    parallel_fwdbwd_chunks: bool = True
    """The chunks of a large batch are sent at once."""
    proto_compress_fwdbwd: bool = False
    """Batches are compressed, which pays on a slow network."""
    fwdbwd_max_chunk_len: PositiveInt = 1024
    """Data in a chunk."""
    fwdbwd_max_chunk_bytes_count: PositiveInt = 5_000_000
    """Bytes of a chunk, as the SDK estimates them."""
    use_pyqwest_transport: bool = True
    """The SDK's own choice of HTTP client. False: httpx."""


class GatewayConfig(Config):
    """The gateway: serves the Tinker SDK, and OpenAI's wire for sampling.

    It keeps nothing: any number of them may run.
    """

    listen: Address = "127.0.0.1:7450"
    """Address to serve HTTP at, host:port. Port 0: a free one."""
    coordinator: Annotated[str, AfterValidator(_check_coordinators)]
    """Address of the coordinator, host:port; of several coordinators all, separated by commas."""
    public_url: str = ""
    """Where clients reach the gateways, e.g. https://tinker.example.org: URLs of downloads begin
    with it. Empty: as the request came, which is right unless a proxy stands in between."""
    base_models: list[ServedModel] = []
    """Base models whose tokenizers lie elsewhere than their names say."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=60 * 2**20)] = 48 * 2**20
    """Largest body of a request, after decompression."""
    max_held_bytes: PositiveInt = 512 * 2**20
    """Bodies held at once; more are put off with 429. One project has half of it at most, so it is
    at least four times max_body_bytes: a body may be there twice, compressed and not."""
    max_hold_s: Annotated[float, Field(gt=0, le=30)] = 30.0
    """Longest that a poll for a result is held."""
    key_cache_s: NonNegativeFloat = 5.0
    """How long a key is believed without asking the coordinator: a deleted one stops then."""
    token_lifetime_s: Annotated[float, Field(ge=60, le=86400)] = 3600.0
    """How long the tokens last that the SDK exchanges its key for."""
    tokens: bool = True
    """Whether the SDK is told to exchange its key for a token, without which it has no whoami."""
    max_target_columns: PositiveInt = 32
    """Columns of target_tokens [N, K]: each is a pass of its own over the sequence."""
    unembedding: bool = False
    """Whether train_unembed adapts the unembedding, which vLLM samplers do not load."""
    stable_reinforce: Literal["substitute", "refuse"] = "substitute"
    """The loss whose formula is not public: the mesh's own in its place, or none."""
    model_idle_ttl_s: Annotated[float, Field(ge=60)] = 4 * 3600.0
    """How long a model is kept after its last request and, of the newest `leases_per_session` of a
    session, after the last sign of life of that. Its checkpoints stay."""
    lease_ttl_s: Annotated[float, Field(ge=60, le=3600)] = 900.0
    """How long a sampling session's version is kept after its last sample or, where it is one of
    the newest, after the last sign of life of its session."""
    leases_per_session: PositiveInt = 32
    """The newest sampling sessions of a session, whose versions are kept while it lives."""
    url_lifetime_s: Annotated[float, Field(ge=60, le=86400)] = 3600.0
    """How long URLs of downloads last."""
    client: ClientConfig = ClientConfig()
    """What the SDK does."""
    openai: OpenAiConfig = OpenAiConfig()
    """The endpoints below /v1."""
    drain_s: NonNegativeFloat = 10.0
    """Seconds that requests under way get to finish when the gateway is told to end."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        least = 4 * self.max_body_bytes
        if self.max_held_bytes < least:
            raise ValueError(
                f"max_held_bytes: {self.max_held_bytes} is under {least}, four times max_body_bytes"
            )
        return self

    def tokenizer_of(self, base_model: str) -> str:
        """What the SDK loads its tokenizer from."""
        named = {model.name: model.tokenizer for model in self.base_models}
        return named.get(base_model, "") or base_model

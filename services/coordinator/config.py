"""Configuration of the coordinator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rollmesh.config import Address, Config, ModelPath, PeerAddress
from rollmesh.job import Priority
from rollmesh.names import ID_PATTERN
from rollmesh.telemetry import TelemetryConfig


def _check_database(url: str) -> str:
    if url and not re.match(r"(?:sqlite:///.|postgresql://.)", url):
        raise ValueError("needed is sqlite:///FILE or postgresql://USER@HOST/NAME")
    return url


class TokenizerConfig(Config):
    """A base model that the mesh serves."""

    name: str = Field(min_length=1)
    """As trainers and samplers say it, and jobs ask for it."""
    tokenizer: ModelPath = ""
    """Local folder, where ~ is the home folder, or hub id with the tokenizer. Empty: the name."""


class ProjectLimits(Config):
    """A project's share of the fleet, and its quotas.

    What is over a quota waits, if it is a job's, and is refused with QUOTA_EXCEEDED, if it is an
    interactive call.
    """

    weight: Annotated[PositiveFloat, Field(le=1e6)] = 1.0
    """Under contention it gets tokens in proportion to this."""
    max_priority: Priority = "normal"
    """The highest class that its jobs and calls may ask for. Where it is low, they have that also
    if they ask for normal, which is what clients do by default."""
    max_running_jobs: PositiveInt | None = None
    """Jobs that run at once. Absent: as many as max_running_jobs of the coordinator allows."""
    max_adapters: PositiveInt | None = None
    """Adapters that it has at once, those of its jobs included. Absent: no bound."""
    max_tokens_in_flight: PositiveInt | None = None
    """Tokens, prompts and what is expected to be drawn, of its requests that samplers work on at
    once. Absent: no bound."""
    tokens_per_day: PositiveInt | None = None
    """Tokens, prompts and what was drawn, of a day in UTC. Nothing begins when what was used and
    what is in flight, expected as for max_tokens_in_flight, is that much; what has begun goes on.
    So it is exceeded by one request at most, by completions that are longer than expected (those
    without max_tokens), and by what is drawn again after a sampler was lost. Absent: no bound."""


class ProjectConfig(ProjectLimits):
    """A project with limits of its own."""

    id: str = Field(pattern=rf"^{ID_PATTERN}$")
    """Id of the project."""


class CoordinatorConfig(Config):
    """The coordinator: the door of the mesh. It asks for no key: any valid project is let in."""

    listen: Address = "127.0.0.1:7400"
    """Address to serve at, host:port. Port 0: a free one."""
    advertise: PeerAddress | None = None
    """Address at which clients reach this coordinator, host:port: others that do not lead send them
    there. Absent: the one that it listens at, with the machine's name for 0.0.0.0 and [::]."""
    state_dir: Path = Path(".rollmesh")
    """Folder of the SQLite file where no database is named, and of the blobs where no store is.
    Made if missing."""
    database: Annotated[str, AfterValidator(_check_database)] = ""
    """sqlite:///FILE or postgresql://USER@HOST/NAME (the password in the environment variable
    PGPASSWORD). Several coordinators may share one: one of them leads. Empty: coordinator.sqlite in
    state_dir."""
    blobs: str = ""
    """Folder, or URL that fsspec understands (s3://BUCKET/PREFIX), of the mesh's blob store:
    snapshots of adapters, published versions, and large bodies of ops. The trainers' must be the
    same. Empty: blobs in state_dir."""
    trainers: list[PeerAddress] = Field(min_length=1)
    """Addresses of the trainers, host:port."""
    samplers: list[PeerAddress] = Field(min_length=1)
    """Addresses of the samplers, host:port."""
    reward: PeerAddress
    """Address of the reward service, host:port."""
    base_models: list[TokenizerConfig] = []
    """Base models that are known also while nobody serves them, and tokenizers that lie elsewhere
    than the model's name says."""
    projects: list[ProjectConfig] = []
    """Projects with limits of their own."""
    default_project: ProjectLimits = ProjectLimits()
    """The limits of every other project."""
    prompt_token_price: NonNegativeFloat = 0.25
    """What a prompt's token counts for a project's share, where a drawn one counts 1."""
    max_running_jobs: PositiveInt = 16
    """Jobs that run at once; the others wait as PENDING, in the order of their creation."""
    max_pending_jobs: PositiveInt = 1000
    """Jobs that may wait; one more is refused with OVERLOADED."""
    max_running_completions: PositiveInt = 256
    """Completions that one sampler draws at once; further requests wait in the coordinator."""
    max_queued_requests: PositiveInt = 4096
    """Sample requests of one project for one base model that may wait; one more is refused with
    OVERLOADED, and a job's waits in line until there is room."""
    request_retention_s: PositiveFloat = 30 * 86400.0
    """How long a request_id is remembered; a repeat after that is a new request."""
    trainer_lease_s: PositiveFloat = 10.0
    """How long a trainer that does not answer keeps its adapters; then others take them over."""
    snapshot_every_ops: PositiveInt = 20
    """Training ops of an adapter after which it is written to the blob store: a recovery runs the
    ops after that again, at most about twice as many."""
    snapshot_every_bytes: PositiveInt = 64 * 2**20
    """Bytes of their bodies after which it is written, if that comes first."""
    result_retention_s: PositiveFloat = 3600.0
    """How long the result of a training op is kept for a repeat, and that of a future; that of an
    adapter's newest op is kept until a later one is answered."""
    version_retention_s: NonNegativeFloat = 600.0
    """How long a published version can be sampled after a newer one was published. The newest, what
    a job needs and what is leased are kept in any case."""
    max_superseded_versions: PositiveInt = 64
    """Superseded versions of an adapter that are kept for that time, not counting what is leased;
    beyond it the oldest go at once."""
    max_leases: PositiveInt = 1000
    """Leases on versions that a project may have at once; one more is refused with OVERLOADED."""
    max_records: PositiveInt = 100_000
    """Records that a project may have at once, of 256 KiB at most each; one more is refused with
    OVERLOADED. They are what the gateway knows of sessions, models and checkpoints."""
    max_keys: PositiveInt = 100
    """Keys that a project may have at once; one more is refused with OVERLOADED."""
    max_futures: PositiveInt = 8192
    """Futures of a project that are not done, and as many of sampling besides; one more is refused
    with OVERLOADED."""
    max_sampling_futures: PositiveInt = 65536
    """Futures of sampling, of all projects together, that are not done."""
    max_sampling_bytes: Annotated[PositiveInt, Field(ge=2**27)] = 2**30
    """Memory for futures of sampling, of all projects together: what they ask, and what was drawn.
    Beyond it the oldest results go before their time, and work is refused with OVERLOADED; so it is
    when what is not done takes half of it."""
    max_project_sampling_bytes: Annotated[PositiveInt, Field(ge=2**27)] = 2**28
    """The same, of one project."""
    event_retention_s: PositiveFloat = 30 * 86400.0
    """How long the events of a job are kept after it has ended; then only its last one is."""
    rollout_retention_s: NonNegativeFloat = 0.0
    """How long a job's finished groups are kept after they were trained. Those that wait for their
    step are kept in any case."""
    leader_lease_s: Annotated[PositiveFloat, Field(ge=1)] = 5.0
    """Of several coordinators on one database one leads. One that has not said so for this long is
    succeeded by another."""
    drain_s: NonNegativeFloat = 10.0
    """Seconds that calls under way get to finish when the coordinator is told to end."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Traces, metrics and logs."""

    @property
    def database_url(self) -> str:
        """Where the store is."""
        return self.database or f"sqlite:///{self.state_dir / 'coordinator.sqlite'}"

    @property
    def blobs_url(self) -> str:
        """Where the blobs are."""
        return self.blobs or str((self.state_dir / "blobs").absolute())

    def tokenizer_of(self, base_model: str) -> str:
        """Local folder or hub id of the tokenizer of `base_model`."""
        named = {model.name: model.tokenizer for model in self.base_models}
        return named.get(base_model, "") or base_model

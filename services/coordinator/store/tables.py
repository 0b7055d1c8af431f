"""The schema, as the migrations make it (a test keeps the two equal).

JSON is kept as text: PostgreSQL's own type refuses NaN, which a metric may be.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

# Bytes, not a language's alphabet, decide the order of names on PostgreSQL too.
_Name = String(160).with_variant(String(160, collation="C"), "postgresql")
_CheckpointName = String(240).with_variant(String(240, collation="C"), "postgresql")

jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True),  # grows with every job: the order of the queue
    Column("name", _Name, nullable=False, unique=True),
    Column("project", _Name, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("state_reason", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("spec", Text, nullable=False),
    # The spec with only the first task of each dataset: what is shown, without reading megabytes.
    Column("brief_spec", Text, nullable=False),
    Column("create_time", Double, nullable=False),
    Column("update_time", Double, nullable=False),
    # Empty until its adapter is ready.
    Column("adapter", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("metrics", Text, nullable=False),
    Column("first_evaluation", Text),
    Column("last_evaluation", Text),
    Column("last_event", BigInteger, nullable=False),
    Column("priority", String(8), nullable=False),
    # What its loop knows besides: JSON of its own, written with the step or evaluation it is of.
    Column("memory", Text, nullable=False),
    Column("best_evaluation", Text),
    Column("best_checkpoint", Text, nullable=False),
    # Name of the sweep that made it.
    Column("sweep", _Name),
    Column("needs_sampler", Boolean, nullable=False),
    Index("jobs_by_sweep", "sweep"),
    Index("jobs_by_project", "project", "id"),
    Index("jobs_by_phase", "phase", "id"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", Integer, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("time", Double, nullable=False),
    Column("event", Text, nullable=False),
)

# Groups that are sampled and scored: what a successor does not sample again.
job_groups = Table(
    "job_groups",
    metadata,
    Column("job_id", Integer, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("body", LargeBinary, nullable=False),
    Column("create_time", Double, nullable=False),
    # When the step that it was trained in was recorded. Absent: it waits for it.
    Column("trained_time", Double),
    Index("job_groups_by_time", "trained_time"),
)

sweeps = Table(
    "sweeps",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", _Name, nullable=False, unique=True),
    Column("project", _Name, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("brief_spec", Text, nullable=False),
    # Whether its jobs wait for each other.
    Column("halving", Boolean, nullable=False),
    Column("create_time", Double, nullable=False),
    Index("sweeps_by_project", "project", "id"),
    Index("sweeps_by_phase", "phase", "id"),
)

sweep_jobs = Table(
    "sweep_jobs",
    metadata,
    Column("sweep_id", Integer, ForeignKey("sweeps.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("job", _Name, nullable=False, unique=True),
    # Its values by path, as JSON.
    Column("point", Text, nullable=False),
    Column("rung", Integer, nullable=False),
    Column("halved", Boolean, nullable=False),
    # Of the steps since the last comparison: of those with a mean reward, their number and sum.
    Column("reward_count", Integer, nullable=False),
    Column("reward_sum", Double, nullable=False),
    # What the last comparison went by.
    Column("compared", Double),
)

# Tokens by project and day (UTC, days since 1970): what quotas of a day go by after a restart.
usage = Table(
    "usage",
    metadata,
    Column("project", _Name, primary_key=True),
    Column("day", Integer, primary_key=True),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("drawn_tokens", BigInteger, nullable=False),
)

# One row: who leads. A write of anybody else is refused.
leadership = Table(
    "leadership",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("holder", Text, nullable=False),
    # Raised with each new leader: the fencing token.
    Column("epoch", BigInteger, nullable=False),
    # Raised with each sign of life: who waits sees it change and needs no common clock.
    Column("renewals", BigInteger, nullable=False),
    Column("address", Text, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("project", _Name, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("lora", Text, nullable=False),
    Column("job", _Name, ForeignKey("jobs.name")),
    # Empty: the name is reserved, no trainer was asked yet.
    Column("trainer", Text, nullable=False),
    # Whether the trainer said that it has it.
    Column("ready", Boolean, nullable=False),
    Column("policy_version", BigInteger, nullable=False),
    Column("next_sequence", BigInteger, nullable=False),
    Column("published_version", BigInteger),
    Column("published_digest", Text, nullable=False),
    Column("create_time", Double, nullable=False),
    # The fencing token: raised each time a trainer is given the adapter.
    Column("epoch", BigInteger, nullable=False),
    # types.Snapshot as JSON: what recovery begins with. Absent: with `origin`, or a fresh adapter.
    Column("snapshot", Text),
    # Of a fork: {"snapshot": types.Snapshot, "with_optimizer": …} as JSON.
    Column("origin", Text),
    # Versions that its trainer has to keep.
    Column("num_versions", Integer, nullable=False),
    # Why it cannot be recovered. Empty: it can.
    Column("problem", Text, nullable=False),
    Column("idle_ttl_s", Double),
    # When it was last trained, published or sampled, to the minute.
    Column("use_time", Double, nullable=False),
    # Whether it takes one of its project's max_adapters: it is there, or is being made.
    Column("counts", Boolean, nullable=False),
    Index("adapters_by_project", "project", "name"),
    Index("adapters_by_trainer", "trainer", "name"),
)

# The journal. An op's row comes before the op runs, its result before it is answered.
ops = Table(
    "ops",
    metadata,
    Column("adapter", _Name, ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("kind", String(32), nullable=False),
    # sha256 of kind and body.
    Column("digest", String(64), nullable=False),
    # A large body or result is a blob, and this is its key. Neither: it is in a snapshot.
    Column("body", LargeBinary),
    Column("body_key", Text),
    # Of a LoadSnapshot: the blobs that replaying it needs.
    Column("snapshot_key", Text),
    Column("done", Boolean, nullable=False),
    Column("result", LargeBinary),
    Column("result_key", Text),
    Column("create_time", Double, nullable=False),
    Column("done_time", Double),
    Index("ops_by_done_time", "done_time"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("name", _CheckpointName, primary_key=True),
    Column("project", _Name, nullable=False),
    Column("adapter", _Name, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("lora", Text, nullable=False),
    # types.Snapshot as JSON. Absent: the name is reserved, nothing is written yet.
    Column("snapshot", Text),
    Column("create_time", Double, nullable=False),
    Column("expire_time", Double),
    Index("checkpoints_by_adapter", "adapter", "name"),
    Index("checkpoints_by_time", "expire_time"),
)

versions = Table(
    "versions",
    metadata,
    Column("adapter", _Name, ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True),
    Column("policy_version", BigInteger, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("create_time", Double, nullable=False),
    # Of the blob with its file, which its trainer writes beside its work. Empty: there is none.
    Column("export_key", Text, nullable=False),
    # When a newer one was published. Absent: it is the newest.
    Column("supersede_time", Double),
    Index("versions_by_supersede_time", "supersede_time"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("project", _Name, nullable=False),
    Column("adapter", _Name, nullable=False),
    Column("policy_version", BigInteger, nullable=False),
    Column("expire_time", Double, nullable=False),
    # With an adapter go its versions, and with them the leases. Nothing else lets go of a version
    # that is leased.
    ForeignKeyConstraint(
        ["adapter", "policy_version"],
        ["versions.adapter", "versions.policy_version"],
        ondelete="CASCADE",
    ),
    Index("leases_by_version", "adapter", "policy_version"),
    Index("leases_by_project", "project", "expire_time"),
    Index("leases_by_time", "expire_time"),
)

requests = Table(
    "requests",
    metadata,
    Column("project", _Name, primary_key=True),
    Column("request_id", String(128), primary_key=True),
    # sha256 of the method and what was asked.
    Column("digest", String(64), nullable=False),
    Column("resource", Text, nullable=False),
    Column("create_time", Double, nullable=False),
    Index("requests_by_time", "create_time"),
)

# Work that was taken and is done later; that of sampling is not here.
futures = Table(
    "futures",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("project", _Name, nullable=False),
    # Id of the order that it is part of. Absent: it is in none.
    Column("queue", String(63)),
    Column("position", BigInteger, nullable=False),
    # sha256 of the work.
    Column("digest", String(64), nullable=False),
    # Of a training op: what it trains.
    Column("adapter", _Name),
    # What is large is a blob, and this is its key. Neither body: it is done.
    Column("body", LargeBinary),
    Column("body_key", Text),
    # Of a training op: that which it was given, before it was first tried.
    Column("sequence", BigInteger),
    Column("done", Boolean, nullable=False),
    Column("result", LargeBinary),
    Column("result_key", Text),
    Column("create_time", Double, nullable=False),
    Column("done_time", Double),
    UniqueConstraint("project", "queue", "position", name="futures_by_queue"),
    Index("futures_by_time", "done", "done_time"),
    Index("futures_by_project", "project", "done"),
)

# What services without a state of their own know of a project.
records = Table(
    "records",
    metadata,
    Column("project", _Name, primary_key=True),
    Column("key", _CheckpointName, primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("create_time", Double, nullable=False),
    Column("expire_time", Double),
    Index("records_by_time", "expire_time"),
    Index("records_by_age", "project", "create_time"),
)

# Who may act for a project.
keys = Table(
    "keys",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("project", _Name, nullable=False),
    Column("note", Text, nullable=False),
    Column("prefix", String(16), nullable=False),
    # sha256 of the secret, which has 256 random bits.
    Column("hash", String(64), nullable=False, unique=True),
    Column("create_time", Double, nullable=False),
    Index("keys_by_project", "project", "create_time"),
)

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
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

# Bytes, not a language's alphabet, decide the order of names on PostgreSQL too.
_Name = String(160).with_variant(String(160, collation="C"), "postgresql")

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
    Index("adapters_by_project", "project", "name"),
)

versions = Table(
    "versions",
    metadata,
    Column("adapter", _Name, ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True),
    Column("policy_version", BigInteger, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("create_time", Double, nullable=False),
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

"""Jobs with their events, adapters with their versions, request ids."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NAME = sa.String(160).with_variant(sa.String(160, collation="C"), "postgresql")


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", _NAME, nullable=False, unique=True),
        sa.Column("project", _NAME, nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("state_reason", sa.Text, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("brief_spec", sa.Text, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("update_time", sa.Double, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("first_evaluation", sa.Text),
        sa.Column("last_evaluation", sa.Text),
        sa.Column("last_event", sa.BigInteger, nullable=False),
    )
    op.create_index("jobs_by_project", "jobs", ["project", "id"])
    op.create_index("jobs_by_phase", "jobs", ["phase", "id"])
    op.create_table(
        "job_events",
        sa.Column(
            "job_id", sa.Integer, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("number", sa.BigInteger, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
    )
    op.create_table(
        "adapters",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("project", _NAME, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("lora", sa.Text, nullable=False),
        sa.Column("job", _NAME, sa.ForeignKey("jobs.name")),
        sa.Column("trainer", sa.Text, nullable=False),
        sa.Column("ready", sa.Boolean, nullable=False),
        sa.Column("policy_version", sa.BigInteger, nullable=False),
        sa.Column("next_sequence", sa.BigInteger, nullable=False),
        sa.Column("published_version", sa.BigInteger),
        sa.Column("published_digest", sa.Text, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
    )
    op.create_index("adapters_by_project", "adapters", ["project", "name"])
    op.create_table(
        "versions",
        sa.Column(
            "adapter", _NAME, sa.ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("policy_version", sa.BigInteger, primary_key=True),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
    )
    op.create_table(
        "requests",
        sa.Column("project", _NAME, primary_key=True),
        sa.Column("request_id", sa.String(128), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("resource", sa.Text, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
    )
    op.create_index("requests_by_time", "requests", ["create_time"])

"""Finished groups, sweeps, usage, who leads; and what jobs remember."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NAME = sa.String(160).with_variant(sa.String(160, collation="C"), "postgresql")


def upgrade() -> None:
    """Add them. A job that runs meanwhile has no finished groups here: it samples them again."""
    # Defaults stay: to take them away SQLite makes the table anew, and so drops what refers to it.
    for column in (
        sa.Column("priority", sa.String(8), nullable=False, server_default="normal"),
        sa.Column("memory", sa.Text, nullable=False, server_default="{}"),
        sa.Column("best_evaluation", sa.Text),
        sa.Column("best_checkpoint", sa.Text, nullable=False, server_default=""),
        sa.Column("sweep", _NAME),
        sa.Column("needs_sampler", sa.Boolean, nullable=False, server_default=sa.true()),
    ):
        op.add_column("jobs", column)
    op.create_index("jobs_by_sweep", "jobs", ["sweep"])
    counts = sa.Column("counts", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column("adapters", counts)
    op.execute(sa.text("UPDATE adapters SET counts = ready"))
    _groups()
    _sweeps()
    op.create_table(
        "usage",
        sa.Column("project", _NAME, primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("drawn_tokens", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "leadership",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("renewals", sa.BigInteger, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
    )


def _groups() -> None:
    op.create_table(
        "job_groups",
        sa.Column(
            "job_id", sa.Integer, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("number", sa.BigInteger, primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("trained_time", sa.Double),
    )
    op.create_index("job_groups_by_time", "job_groups", ["trained_time"])


def _sweeps() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", _NAME, nullable=False, unique=True),
        sa.Column("project", _NAME, nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("brief_spec", sa.Text, nullable=False),
        sa.Column("halving", sa.Boolean, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
    )
    op.create_index("sweeps_by_project", "sweeps", ["project", "id"])
    op.create_index("sweeps_by_phase", "sweeps", ["phase", "id"])
    op.create_table(
        "sweep_jobs",
        sa.Column(
            "sweep_id", sa.Integer, sa.ForeignKey("sweeps.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("job", _NAME, nullable=False, unique=True),
        sa.Column("point", sa.Text, nullable=False),
        sa.Column("rung", sa.Integer, nullable=False),
        sa.Column("halved", sa.Boolean, nullable=False),
        sa.Column("reward_count", sa.Integer, nullable=False),
        sa.Column("reward_sum", sa.Double, nullable=False),
        sa.Column("compared", sa.Double),
    )

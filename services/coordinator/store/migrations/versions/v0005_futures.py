"""Futures, records, keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NAME = sa.String(160).with_variant(sa.String(160, collation="C"), "postgresql")
_KEY = sa.String(240).with_variant(sa.String(240, collation="C"), "postgresql")


def upgrade() -> None:
    """Add them."""
    op.create_table(
        "futures",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("project", _NAME, nullable=False),
        sa.Column("queue", sa.String(63)),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("adapter", _NAME),
        sa.Column("body", sa.LargeBinary),
        sa.Column("body_key", sa.Text),
        sa.Column("sequence", sa.BigInteger),
        sa.Column("done", sa.Boolean, nullable=False),
        sa.Column("result", sa.LargeBinary),
        sa.Column("result_key", sa.Text),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("done_time", sa.Double),
        sa.UniqueConstraint("project", "queue", "position", name="futures_by_queue"),
    )
    op.create_index("futures_by_time", "futures", ["done", "done_time"])
    op.create_index("futures_by_project", "futures", ["project", "done"])
    op.create_table(
        "records",
        sa.Column("project", _NAME, primary_key=True),
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("expire_time", sa.Double),
    )
    op.create_index("records_by_time", "records", ["expire_time"])
    op.create_index("records_by_age", "records", ["project", "create_time"])
    op.create_table(
        "keys",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("project", _NAME, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("create_time", sa.Double, nullable=False),
    )
    op.create_index("keys_by_project", "keys", ["project", "create_time"])

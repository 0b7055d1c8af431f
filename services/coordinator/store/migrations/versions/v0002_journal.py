"""The journal of training ops, snapshots, who owns an adapter, checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NAME = sa.String(160).with_variant(sa.String(160, collation="C"), "postgresql")
_CHECKPOINT_NAME = sa.String(240).with_variant(sa.String(240, collation="C"), "postgresql")


def upgrade() -> None:
    """Add what recovery needs. Adapters from before have no journal: they cannot be recovered."""
    # Defaults stay: to take them away SQLite makes the table anew, and so drops what refers to it.
    for column in (
        sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("snapshot", sa.Text),
        sa.Column("origin", sa.Text),
        sa.Column("num_versions", sa.Integer, nullable=False, server_default="1"),
        sa.Column("problem", sa.Text, nullable=False, server_default=""),
        sa.Column("idle_ttl_s", sa.Double),
        sa.Column("use_time", sa.Double, nullable=False, server_default="0"),
    ):
        op.add_column("adapters", column)
    op.execute(
        "UPDATE adapters SET problem = 'it was trained before ops were journaled' "
        "WHERE next_sequence > 1"
    )
    op.create_index("adapters_by_trainer", "adapters", ["trainer", "name"])
    op.create_table(
        "ops",
        sa.Column(
            "adapter", _NAME, sa.ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("body", sa.LargeBinary),
        sa.Column("body_key", sa.Text),
        sa.Column("snapshot_key", sa.Text),
        sa.Column("done", sa.Boolean, nullable=False),
        sa.Column("result", sa.LargeBinary),
        sa.Column("result_key", sa.Text),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("done_time", sa.Double),
    )
    op.create_index("ops_by_done_time", "ops", ["done_time"])
    op.create_table(
        "checkpoints",
        sa.Column("name", _CHECKPOINT_NAME, primary_key=True),
        sa.Column("project", _NAME, nullable=False),
        sa.Column("adapter", _NAME, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("lora", sa.Text, nullable=False),
        sa.Column("snapshot", sa.Text),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("expire_time", sa.Double),
    )
    op.create_index("checkpoints_by_adapter", "checkpoints", ["adapter", "name"])
    op.create_index("checkpoints_by_time", "checkpoints", ["expire_time"])

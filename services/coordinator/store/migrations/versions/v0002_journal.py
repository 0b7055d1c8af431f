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
    with op.batch_alter_table("adapters") as adapters:
        adapters.add_column(sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"))
        adapters.add_column(sa.Column("snapshot", sa.Text))
        adapters.add_column(sa.Column("origin", sa.Text))
        adapters.add_column(
            sa.Column("num_versions", sa.Integer, nullable=False, server_default="1")
        )
        adapters.add_column(sa.Column("problem", sa.Text, nullable=False, server_default=""))
        adapters.add_column(sa.Column("idle_ttl_s", sa.Double))
        adapters.add_column(sa.Column("use_time", sa.Double, nullable=False, server_default="0"))
    with op.batch_alter_table("adapters") as adapters:
        adapters.alter_column("epoch", server_default=None)
        adapters.alter_column("num_versions", server_default=None)
        adapters.alter_column("problem", server_default=None)
        adapters.alter_column("use_time", server_default=None)
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

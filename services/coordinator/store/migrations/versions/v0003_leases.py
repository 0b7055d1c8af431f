"""Where versions lie in the blob store, when they were superseded, and leases on them."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NAME = sa.String(160).with_variant(sa.String(160, collation="C"), "postgresql")


def upgrade() -> None:
    """Add what lets versions go. Those from before are nowhere but with their trainer."""
    # Defaults stay: to take them away SQLite makes the table anew, and so drops what refers to it.
    for column in (
        sa.Column("export_key", sa.Text, nullable=False, server_default=""),
        sa.Column("supersede_time", sa.Double),
    ):
        op.add_column("versions", column)
    # As if superseded now: whoever samples an old version has the usual time to take a lease.
    op.execute(
        sa.text(
            "UPDATE versions SET supersede_time = :now WHERE policy_version < "
            "(SELECT published_version FROM adapters WHERE adapters.name = versions.adapter)"
        ).bindparams(now=time.time())
    )
    op.create_index("versions_by_supersede_time", "versions", ["supersede_time"])
    op.create_table(
        "leases",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("project", _NAME, nullable=False),
        sa.Column("adapter", _NAME, nullable=False),
        sa.Column("policy_version", sa.BigInteger, nullable=False),
        sa.Column("expire_time", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter", "policy_version"],
            ["versions.adapter", "versions.policy_version"],
            ondelete="CASCADE",
        ),
    )
    op.create_index("leases_by_version", "leases", ["adapter", "policy_version"])
    op.create_index("leases_by_project", "leases", ["project", "expire_time"])
    op.create_index("leases_by_time", "leases", ["expire_time"])

"""What guests' boots were, and commands that are given for a while only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "measurements",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("resource_id", sa.String(length=130), nullable=False),
        sa.Column("module_id", sa.String(length=32), nullable=False),
        sa.Column("nonce", sa.LargeBinary(), nullable=False),
        sa.Column("pcrs", sa.String(length=80), nullable=False),
        sa.Column("asked_at", sa.Float(precision=53), nullable=False),
        sa.Column("told_at", sa.Float(precision=53), nullable=False),
        sa.Column("found", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("attestation", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_measurements")),
    )
    op.create_index("ix_measurements_resource_id", "measurements", ["resource_id", "asked_at"], unique=False)
    op.create_index("ix_measurements_asked_at", "measurements", ["asked_at"], unique=False)
    # with a default: there are commands, and managers of the release before that go on adding some until they are replaced
    op.add_column("commands", sa.Column("give_until", sa.Float(precision=53), nullable=False, server_default="0"))

"""Lines that are due at the same moment are taken host by host."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.drop_index("ix_lines_look_at", table_name="lines")
    op.create_index("ix_lines_look_at", "lines", ["look_at", "resource_id"], unique=False)

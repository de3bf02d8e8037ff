"""The certificates of the TPMs that attested guests' boots."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # with a default: managers of the release before that go on adding measurements until they are replaced
    nothing = sa.text("x''" if op.get_bind().dialect.name == "sqlite" else "''")
    op.add_column("measurements", sa.Column("certificates", sa.LargeBinary(), nullable=False, server_default=nothing))

"""The built-in authorities and what they issued."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "ca_authorities",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("root", sa.LargeBinary, nullable=False),
        sa.Column("intermediate", sa.LargeBinary, nullable=False),
        sa.Column("made_at", sa.BigInteger, nullable=False),
        sa.Column("crl_number", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_ca_authorities"),
    )
    op.create_table(
        "ca_certificates",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("authority", sa.String(64), nullable=False),
        sa.Column("order_id", sa.String(64), nullable=False),
        sa.Column("serial", sa.String(40), nullable=False),
        sa.Column("profile", sa.String(64), nullable=False),
        sa.Column("names", sa.Text, nullable=False),
        sa.Column("der", sa.LargeBinary, nullable=False),
        sa.Column("not_before", sa.BigInteger, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("revoked_at", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ca_certificates"),
        sa.ForeignKeyConstraint(["authority"], ["ca_authorities.name"], name="fk_ca_certificates_authority"),
    )
    op.create_index("uq_ca_certificates_order", "ca_certificates", ["authority", "order_id"], unique=True)
    op.create_index("uq_ca_certificates_serial", "ca_certificates", ["authority", "serial"], unique=True)
    op.create_index("ix_ca_certificates_revoked", "ca_certificates", ["authority", "revoked_at"])

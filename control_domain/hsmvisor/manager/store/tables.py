"""The manager's tables.  Times are seconds since 1970, 0 = never; names are texts as hsmvisor.manager.ca.names writes them.

A change here comes with a migration (migrations/versions); a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: The built-in authorities: their own certificates.
authorities = Table(
    "ca_authorities",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("root", LargeBinary, nullable=False),
    Column("intermediate", LargeBinary, nullable=False),
    Column("made_at", BigInteger, nullable=False),
    Column("crl_number", BigInteger, nullable=False, default=0),
)

#: What they issued.  `order_id`: the same order is issued once.
certificates = Table(
    "ca_certificates",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("authority", String(64), ForeignKey("ca_authorities.name"), nullable=False),
    Column("order_id", String(64), nullable=False),
    Column("serial", String(40), nullable=False),  # hexadecimal
    Column("profile", String(64), nullable=False),
    Column("names", Text, nullable=False),  # one a line
    Column("der", LargeBinary, nullable=False),
    Column("not_before", BigInteger, nullable=False),
    Column("not_after", BigInteger, nullable=False),
    Column("revoked_at", BigInteger, nullable=False, default=0),
    Column("reason", String(32), nullable=False, default=""),
    Index("uq_ca_certificates_order", "authority", "order_id", unique=True),
    Index("uq_ca_certificates_serial", "authority", "serial", unique=True),
    Index("ix_ca_certificates_revoked", "authority", "revoked_at"),
)

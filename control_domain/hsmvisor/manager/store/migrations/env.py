"""Run by alembic: migrates the database whose connection it was given."""

from __future__ import annotations

from alembic import context
from hsmvisor.manager.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()

"""Run by Alembic, within the transaction that `lorafleet.core.arena.database` has begun."""

from alembic import context

from lorafleet.core.arena.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, transactional_ddl=True)
context.run_migrations()

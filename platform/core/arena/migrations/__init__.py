"""The arena's tables, step by step: Alembic runs `env` and what is in `versions` when a store is opened."""

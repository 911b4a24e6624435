"""Pairs made for one rater out of an alias's split, and the CLIP scores of pictures from evaluations."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("pictures", sa.Column("clip_score", sa.Float, nullable=True))
    op.add_column("pairs", sa.Column("is_live", sa.Boolean, nullable=False, server_default=sa.false()))

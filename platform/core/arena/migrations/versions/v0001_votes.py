"""Sessions, pictures, pairs, votes. A vote cannot be changed or deleted: the database refuses it."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_REFUSE = "votes are append-only"


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("token", sa.String(32), nullable=False, unique=True),
        sa.Column("started_unix_s", sa.Float, nullable=False),
    )
    op.create_table(
        "pictures",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column("pool", sa.String(200), nullable=False),
        sa.Column("system", sa.Text, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("added_unix_s", sa.Float, nullable=False),
    )
    op.create_table(
        "picture_files",
        sa.Column("picture_id", sa.Integer, sa.ForeignKey("pictures.id"), primary_key=True),
        sa.Column("png", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "pairs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("token", sa.String(32), nullable=False, unique=True),
        sa.Column("pool", sa.String(200), nullable=False, index=True),
        sa.Column("first_id", sa.Integer, sa.ForeignKey("pictures.id"), nullable=False),
        sa.Column("second_id", sa.Integer, sa.ForeignKey("pictures.id"), nullable=False),
        sa.UniqueConstraint("first_id", "second_id"),
    )
    op.create_table(
        "showings",
        sa.Column("session_id", sa.Integer, sa.ForeignKey("sessions.id"), primary_key=True),
        sa.Column("pair_id", sa.Integer, sa.ForeignKey("pairs.id"), primary_key=True),
        sa.Column("is_swapped", sa.Boolean, nullable=False),
        sa.Column("shown_unix_s", sa.Float, nullable=False),
    )
    op.create_table(
        "votes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("session_id", sa.Integer, sa.ForeignKey("sessions.id"), nullable=False),
        sa.Column("pair_id", sa.Integer, sa.ForeignKey("pairs.id"), nullable=False, index=True),
        sa.Column("choice", sa.String(5), nullable=False),
        sa.Column("voted_unix_s", sa.Float, nullable=False),
        sa.UniqueConstraint("session_id", "pair_id"),
        sa.CheckConstraint("choice in ('left', 'right', 'tie')", name="choice_is_known"),
    )
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER votes_no_{event.lower()} BEFORE {event} ON votes "
                f"BEGIN SELECT RAISE(ABORT, '{_REFUSE}'); END"
            )
    else:
        op.execute(
            "CREATE FUNCTION lorafleet_refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{_REFUSE}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER votes_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON votes "
            "FOR EACH STATEMENT EXECUTE FUNCTION lorafleet_refuse()"
        )

"""The arena's tables as the newest migration leaves them.

sessions        raters; the token is theirs alone, the number stands for them elsewhere
pictures        what a system made of a prompt and a seed; `key` tells whether it is there already
picture_files   PNGs without any chunk that says who made them; none for pictures of live pairs
pairs           two pictures of one prompt, seed and pool; a live one is for the session that asked for it
showings        which picture a session sees on the left: the second one if `is_swapped`
votes           what was answered; the database refuses to change or delete one
"""

import sqlalchemy as sa

METADATA = sa.MetaData()

SESSIONS = sa.Table(
    "sessions",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token", sa.String(32), nullable=False, unique=True),
    sa.Column("started_unix_s", sa.Float, nullable=False),
)
PICTURES = sa.Table(
    "pictures",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(64), nullable=False, unique=True),
    sa.Column("pool", sa.String(200), nullable=False),
    sa.Column("system", sa.Text, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("added_unix_s", sa.Float, nullable=False),
    sa.Column("clip_score", sa.Float, nullable=True),
)
PICTURE_FILES = sa.Table(
    "picture_files",
    METADATA,
    sa.Column("picture_id", sa.Integer, sa.ForeignKey("pictures.id"), primary_key=True),
    sa.Column("png", sa.LargeBinary, nullable=False),
)
PAIRS = sa.Table(
    "pairs",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token", sa.String(32), nullable=False, unique=True),
    sa.Column("pool", sa.String(200), nullable=False, index=True),
    sa.Column("first_id", sa.Integer, sa.ForeignKey("pictures.id"), nullable=False),
    sa.Column("second_id", sa.Integer, sa.ForeignKey("pictures.id"), nullable=False),
    sa.Column("is_live", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("first_id", "second_id"),
)
SHOWINGS = sa.Table(
    "showings",
    METADATA,
    sa.Column("session_id", sa.Integer, sa.ForeignKey("sessions.id"), primary_key=True),
    sa.Column("pair_id", sa.Integer, sa.ForeignKey("pairs.id"), primary_key=True),
    sa.Column("is_swapped", sa.Boolean, nullable=False),
    sa.Column("shown_unix_s", sa.Float, nullable=False),
)
VOTES = sa.Table(
    "votes",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("session_id", sa.Integer, sa.ForeignKey("sessions.id"), nullable=False),
    sa.Column("pair_id", sa.Integer, sa.ForeignKey("pairs.id"), nullable=False, index=True),
    sa.Column("choice", sa.String(5), nullable=False),
    sa.Column("voted_unix_s", sa.Float, nullable=False),
    sa.UniqueConstraint("session_id", "pair_id"),
    sa.CheckConstraint("choice in ('left', 'right', 'tie')", name="choice_is_known"),
)

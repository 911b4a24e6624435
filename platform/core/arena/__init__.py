"""What people prefer: pairs of pictures shown blind, votes, and ratings of the systems that made them.

Its modules need the extra `arena` (SQLAlchemy, Alembic, numpy), `config` and `records` excepted.
"""

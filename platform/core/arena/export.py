"""Votes and ratings as CSV: UTF-8, a header, one line each."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields

from lorafleet.core.arena.records import Rating, Vote


def votes_csv(votes: Iterable[Vote]) -> str:
    """A tie has no winner: the field is empty."""
    return _csv(Vote, votes)


def ratings_csv(ratings: Sequence[Rating]) -> str:
    return _csv(Rating, ratings)


def _csv(kind: type[Vote] | type[Rating], rows: Iterable[Vote] | Iterable[Rating]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(kind)])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()

"""Pairs of pictures, who saw them how, and the votes.

with the service, `lorafleet eval arena` and others at the same database, from any thread:
    store = open_store(ArenaConfig())
    store.add("emoji", entrants)
    shown = store.draw()
    store.vote(shown.session, shown.pair, "left")
"""

import hashlib
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations, islice
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from lorafleet.core.arena.config import ArenaConfig
from lorafleet.core.arena.database import Database
from lorafleet.core.arena.pictures import anonymous
from lorafleet.core.arena.records import Choice, Entrant, Shown, Vote
from lorafleet.core.arena.tables import PAIRS, PICTURE_FILES, PICTURES, SESSIONS, SHOWINGS, VOTES
from lorafleet.core.errors import AlreadyVoted, PairNotFound, SessionNotFound

LIVE: Final = "live"
"""The pool of pairs that were made for one rater."""
BATCH: Final = 64  # pictures of one transaction


class Store:
    """For every thread and for several processes. Every method raises StorageUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, pool: str, entrants: Iterable[Entrant]) -> tuple[int, int]:
        """Adds pictures, and pairs of those of one prompt and seed by different systems; how many of each are new.

        What is there already is not added again, and pairs up with what comes later. Raises InvalidRequest for what is
        no picture; what came some time before it stays.
        """
        pictures = pairs = 0
        for batch in _batches(entrants):
            ready = [(entrant, anonymous(entrant.png or b"")) for entrant in batch]
            with self._database.writing() as connection:
                added = [self._add_picture(connection, pool, entrant, png) for entrant, png in ready]
                new = {number for number in added if number is not None}
                pictures, pairs = pictures + len(new), pairs + self._add_pairs(connection, pool, new)
        return pictures, pairs

    def add_live(self, session: str | None, entrants: tuple[Entrant, Entrant]) -> Shown:
        """A pair that only this session sees, now; its pictures are not kept. As `draw` otherwise."""
        with self._database.writing() as connection:
            rater, token = self._session(connection, session)
            now, pair = time.time(), secrets.token_hex(16)
            first, second = (
                self._insert_picture(connection, LIVE, entrant, key=secrets.token_hex(32)) for entrant in entrants
            )
            row = {"token": pair, "pool": LIVE, "first_id": first, "second_id": second, "is_live": True}
            number = connection.execute(sa.insert(PAIRS).values(**row).returning(PAIRS.c.id)).scalar_one()
            is_swapped = self._show(connection, rater, number, now)
        left, right = (anonymous(entrant.png or b"") for entrant in (entrants[::-1] if is_swapped else entrants))
        return Shown(token, pair, entrants[0].prompt, left, right, 1)

    def draw(self, session: str | None = None, pool: str | None = None) -> Shown:
        """A pair that the session has not voted on, one of those with the fewest votes; without a session one begins.

        Raises SessionNotFound, and PairNotFound when none is left.
        """
        with self._database.writing() as connection:
            rater, token = self._session(connection, session)
            is_open = sa.and_(
                PAIRS.c.is_live.is_(sa.false()),
                *([PAIRS.c.pool == pool] if pool is not None else []),
                ~sa.exists().where(VOTES.c.pair_id == PAIRS.c.id, VOTES.c.session_id == rater),
            )
            cast = sa.select(sa.func.count()).where(VOTES.c.pair_id == PAIRS.c.id).scalar_subquery()
            fewest = sa.select(PAIRS).where(is_open).order_by(cast, sa.func.random()).limit(1)
            pair = connection.execute(fewest).one_or_none()
            if pair is None:
                where = f" in the pool {pool}" if pool is not None else ""
                hint = "come back when there are new ones" if session else "`lorafleet eval arena import` adds some"
                raise PairNotFound(f"no pairs to vote on{where}: {hint}.", param="pool" if pool else None)
            remaining = connection.execute(sa.select(sa.func.count()).select_from(PAIRS).where(is_open)).scalar_one()
            is_swapped = self._show(connection, rater, pair.id, time.time())
            rows = connection.execute(
                sa.select(PICTURES.c.id, PICTURES.c.prompt, PICTURE_FILES.c.png)
                .join(PICTURE_FILES)
                .where(PICTURES.c.id.in_([pair.first_id, pair.second_id]))
            )
            found = {row.id: row for row in rows}
        sides = (pair.second_id, pair.first_id) if is_swapped else (pair.first_id, pair.second_id)
        left, right = (found[side] for side in sides)
        return Shown(token, pair.token, left.prompt, left.png, right.png, remaining)

    def vote(self, session: str, pair: str, choice: Choice) -> None:
        """Raises PairNotFound for a pair that the session was not shown, AlreadyVoted for one that it voted on."""
        shown = (
            sa.select(SHOWINGS.c.session_id, SHOWINGS.c.pair_id)
            .join(SESSIONS)
            .join(PAIRS)
            .where(SESSIONS.c.token == session, PAIRS.c.token == pair)
        )
        try:
            with self._database.writing() as connection:
                found = connection.execute(shown).one_or_none()
                if found is None:
                    self._session(connection, session)
                    raise PairNotFound("pair is none that this session was shown: GET /v1/arena/pair.", param="pair")
                row = {**found._asdict(), "choice": choice, "voted_unix_s": time.time()}
                connection.execute(sa.insert(VOTES).values(**row))
        except IntegrityError:
            raise AlreadyVoted("this session has voted on this pair already: ask for the next one.") from None

    def votes(self, pool: str | None = None) -> list[Vote]:
        """All votes, or those on one pool's pairs, the oldest first."""
        first, second = PICTURES.alias(), PICTURES.alias()
        query = (
            sa.select(
                VOTES,
                SHOWINGS.c.is_swapped,
                *(PAIRS.c[name] for name in ("pool", "first_id")),
                *(first.c[name].label(name) for name in ("prompt", "seed")),
                *(side.c[name].label(f"{which}_{name}")
                  for which, side in (("first", first), ("second", second)) for name in ("system", "clip_score")),
            )
            .join(PAIRS, PAIRS.c.id == VOTES.c.pair_id)
            .join(SHOWINGS, sa.and_(SHOWINGS.c.pair_id == PAIRS.c.id, SHOWINGS.c.session_id == VOTES.c.session_id))
            .join(first, first.c.id == PAIRS.c.first_id)
            .join(second, second.c.id == PAIRS.c.second_id)
            .order_by(VOTES.c.id)
        )  # fmt: skip
        with self._database.reading() as connection:
            rows = connection.execute(query if pool is None else query.where(PAIRS.c.pool == pool)).all()
        return [_vote(row) for row in rows]

    def pools(self) -> dict[str, tuple[int, int]]:
        """Pairs and votes of each pool."""
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        pairs = sa.select(PAIRS.c.pool, sa.func.count().label("n")).group_by(PAIRS.c.pool)
        votes = sa.select(PAIRS.c.pool, sa.func.count().label("n")).join(VOTES).group_by(PAIRS.c.pool)
        with self._database.reading() as connection:
            for at, query in enumerate((pairs, votes)):
                for pool, number in connection.execute(query):
                    counts[pool][at] = number
        return {pool: (of_pairs, of_votes) for pool, (of_pairs, of_votes) in sorted(counts.items())}

    def close(self) -> None:
        self._database.close()

    def _session(self, connection: sa.Connection, token: str | None) -> tuple[int, str]:
        """Number and token, of a new one for None."""
        if token is None:
            token = secrets.token_hex(16)
            begun = sa.insert(SESSIONS).values(token=token, started_unix_s=time.time()).returning(SESSIONS.c.id)
            return connection.execute(begun).scalar_one(), token
        number = connection.execute(sa.select(SESSIONS.c.id).where(SESSIONS.c.token == token)).scalar_one_or_none()
        if number is None:
            raise SessionNotFound("session is none of this store: leave it out to begin one.", param="session")
        return number, token

    def _show(self, connection: sa.Connection, rater: int, pair: int, now: float) -> bool:
        """Whether the second picture is on the left, as drawn when the session first saw the pair."""
        seen = sa.select(SHOWINGS.c.is_swapped).where(SHOWINGS.c.session_id == rater, SHOWINGS.c.pair_id == pair)
        is_swapped: bool | None = connection.execute(seen).scalar_one_or_none()
        if is_swapped is not None:
            return is_swapped
        is_swapped = bool(secrets.randbelow(2))
        row = {"session_id": rater, "pair_id": pair, "is_swapped": is_swapped, "shown_unix_s": now}
        try:
            with connection.begin_nested():
                connection.execute(sa.insert(SHOWINGS).values(**row))
        except IntegrityError:  # the same session asked twice at once
            return bool(connection.execute(seen).scalar_one())
        return is_swapped

    def _add_picture(self, connection: sa.Connection, pool: str, entrant: Entrant, png: bytes) -> int | None:
        """The number of a new one."""
        told = [pool, entrant.system, entrant.prompt, str(entrant.seed), hashlib.sha256(png).hexdigest()]
        key = hashlib.sha256("\0".join(told).encode()).hexdigest()
        if connection.execute(sa.select(PICTURES.c.id).where(PICTURES.c.key == key)).first():
            return None
        number = self._insert_picture(connection, pool, entrant, key=key)
        connection.execute(sa.insert(PICTURE_FILES).values(picture_id=number, png=png))
        return number

    @staticmethod
    def _insert_picture(connection: sa.Connection, pool: str, entrant: Entrant, *, key: str) -> int:
        row = {
            "key": key,
            "pool": pool,
            "system": entrant.system,
            "prompt": entrant.prompt.replace("\0", ""),  # which PostgreSQL's text cannot hold
            "seed": entrant.seed,
            "clip_score": entrant.clip_score,
            "added_unix_s": time.time(),
        }
        return int(connection.execute(sa.insert(PICTURES).values(**row).returning(PICTURES.c.id)).scalar_one())

    @staticmethod
    def _add_pairs(connection: sa.Connection, pool: str, new: set[int]) -> int:
        """Pairs of new pictures with others and with each other."""
        wanted = (PICTURES.c[name] for name in ("id", "system", "prompt", "seed"))
        query = sa.select(*wanted).where(PICTURES.c.pool == pool)
        like: dict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
        for number, system, prompt, seed in connection.execute(query):
            like[prompt, seed].append((number, system))
        rows = [
            {"token": secrets.token_hex(16), "pool": pool, "first_id": first, "second_id": second}
            for alike in like.values()
            for (first, one), (second, other) in combinations(sorted(alike), 2)
            if one != other and (first in new or second in new)
        ]
        if rows:
            connection.execute(sa.insert(PAIRS), rows)
        return len(rows)


def open_store(config: ArenaConfig) -> Store:
    """Makes the database's tables or brings them up to date. Blocks. Raises StorageUnavailable."""
    return Store(Database(config.database_url))


def _batches(entrants: Iterable[Entrant]) -> Iterator[list[Entrant]]:
    waiting = iter(entrants)
    while batch := list(islice(waiting, BATCH)):
        yield batch


def _vote(row: Any) -> Vote:
    first, second = (row.first_system, row.first_clip_score), (row.second_system, row.second_clip_score)
    left, right = (second, first) if row.is_swapped else (first, second)
    return Vote(
        rater=row.session_id,
        pair=row.pair_id,
        pool=row.pool,
        prompt=row.prompt,
        seed=row.seed,
        left=left[0],
        right=right[0],
        winner={"left": left[0], "right": right[0], "tie": None}[row.choice],
        left_clip=left[1],
        right_clip=right[1],
        voted_unix_s=row.voted_unix_s,
    )

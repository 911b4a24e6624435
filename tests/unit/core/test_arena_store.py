"""The arena's store on SQLite and, where there is one, on PostgreSQL: blind pairs, votes that stay, migrations."""

import io
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorafleet.core.arena.config import ArenaConfig
from lorafleet.core.arena.database import Database
from lorafleet.core.arena.records import Entrant
from lorafleet.core.arena.store import Store, open_store
from lorafleet.core.arena.tables import METADATA, VOTES
from lorafleet.core.errors import (
    AlreadyVoted,
    InvalidRequest,
    LorafleetError,
    PairNotFound,
    SessionNotFound,
    StorageUnavailable,
)

SYSTEMS = {"base": "red", "plush": "blue"}


def png(colour: str, note: str = "") -> bytes:
    info = PngInfo()
    info.add_text("parameters", note)
    info.add_itxt("lorafleet", note)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def colour_of(data: bytes) -> tuple[int, ...]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.info == {}
        return image.getpixel((0, 0))  # type: ignore[return-value] # RGB


def entrants(prompts: int = 3) -> list[Entrant]:
    return [
        Entrant(system, f"prompt {number}", 7, png(colour, f"made by {system}"), 20.0 + number)
        for number in range(prompts)
        for system, colour in SYSTEMS.items()
    ]


@pytest.fixture(scope="module")
def postgres(require: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of its own, on a socket in a folder."""
    binaries = Path(require("postgres")).resolve().parent
    folder = tmp_path_factory.mktemp("postgres", numbered=False)
    for parent in folder.parents[: len(folder.parents) - 2]:  # pytest's own are closed to others
        parent.chmod(parent.stat().st_mode | 0o011)
    owner: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
    if owner:
        shutil.chown(folder, "postgres")
    options = ["--auth=trust", "--username=lorafleet", "--no-sync", "--encoding=UTF8"]
    subprocess.run([binaries / "initdb", "-D", folder / "data", *options], check=True, capture_output=True, **owner)
    server = [binaries / "postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    process = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **owner)
    url = f"postgresql://lorafleet@/postgres?host={folder}"
    give_up_at = time.monotonic() + 30
    while not (folder / ".s.PGSQL.5432").exists():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    yield url
    process.send_signal(signal.SIGINT)  # a fast shutdown: on SIGTERM it waits for everybody to leave
    process.wait()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/deep/arena.sqlite"
    address: str = request.getfixturevalue("postgres")
    engine = sa.create_engine(address)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return address


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(ArenaConfig(url=url))
    yield store
    store.close()


def test_pairs_are_blind_and_votes_say_what_was_chosen(store: Store) -> None:
    assert store.add("emoji", entrants()) == (6, 3)
    assert store.add("emoji", entrants()) == (0, 0)  # once more: nothing new
    shown = store.draw()
    assert shown.remaining == 3
    assert {colour_of(shown.left), colour_of(shown.right)} == {(255, 0, 0), (0, 0, 255)}
    assert b"base" not in shown.left + shown.right
    store.vote(shown.session, shown.pair, "left")
    second = store.draw(shown.session)
    assert (second.session, second.remaining) == (shown.session, 2)
    assert second.pair != shown.pair
    store.vote(shown.session, second.pair, "tie")

    first, tie = store.votes()
    chosen = "base" if colour_of(shown.left) == (255, 0, 0) else "plush"
    assert (first.left, first.winner) == (chosen, chosen)
    assert (first.prompt, first.seed, first.pool) == (shown.prompt, 7, "emoji")
    assert first.left_clip == 20.0 + int(shown.prompt.split()[1])
    assert (tie.winner, {tie.left, tie.right}) == (None, {"base", "plush"})
    assert store.votes("other") == []
    assert store.pools() == {"emoji": (3, 2)}


def test_a_session_votes_once_on_what_it_was_shown(store: Store) -> None:
    store.add("emoji", entrants(1))
    shown = store.draw()
    store.vote(shown.session, shown.pair, "right")
    with pytest.raises(AlreadyVoted):
        store.vote(shown.session, shown.pair, "left")
    with pytest.raises(PairNotFound, match="come back"):
        store.draw(shown.session)
    with pytest.raises(PairNotFound, match="in the pool coco"):
        store.draw(pool="coco")
    with pytest.raises(SessionNotFound):
        store.draw("0" * 32)
    with pytest.raises(PairNotFound):
        store.vote(shown.session, "0" * 32, "left")
    other = store.draw()
    assert (other.pair, len(store.votes())) == (shown.pair, 1)
    with pytest.raises(SessionNotFound):
        store.vote("0" * 32, shown.pair, "left")


def test_sides_are_drawn_by_lot_and_stay_for_a_session(store: Store) -> None:
    store.add("emoji", entrants(1))
    sides = Counter[tuple[int, ...]]()
    for _ in range(40):
        shown = store.draw()
        assert store.draw(shown.session).left == shown.left
        sides[colour_of(shown.left)] += 1
    assert min(sides.values()) > 5  # 40 throws of a coin: 1 in a million


def test_pairs_with_the_fewest_votes_come_first(store: Store) -> None:
    store.add("emoji", entrants(4))
    for _ in range(8):
        shown = store.draw()
        store.vote(shown.session, shown.pair, "tie")
    assert set(Counter(vote.pair for vote in store.votes()).values()) == {2}


def test_a_live_pair_is_for_its_session_alone(store: Store) -> None:
    pair = (Entrant("plush@aaa", "a cat", 1, png("red")), Entrant("plush@bbb", "a cat", 1, png("blue")))
    shown = store.add_live(None, pair)
    assert {colour_of(shown.left), colour_of(shown.right)} == {(255, 0, 0), (0, 0, 255)}
    with pytest.raises(PairNotFound):
        store.draw()
    store.vote(shown.session, shown.pair, "right")
    (vote,) = store.votes("live")
    assert vote.winner == ("plush@bbb" if colour_of(shown.right) == (0, 0, 255) else "plush@aaa")
    assert store.add_live(shown.session, pair).session == shown.session
    with pytest.raises(SessionNotFound):
        store.add_live("0" * 32, pair)


def test_one_session_at_once_votes_once(store: Store) -> None:
    store.add("emoji", entrants(1))
    shown = store.draw()
    failures: list[LorafleetError] = []

    def vote() -> None:
        try:
            assert store.draw(shown.session).left == shown.left
            store.vote(shown.session, shown.pair, "left")
        except LorafleetError as error:
            failures.append(error)

    threads = [threading.Thread(target=vote) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.votes()) == 1
    assert {type(failure) for failure in failures} <= {AlreadyVoted, PairNotFound}  # none left, once it has voted
    assert len(failures) == 7


def test_the_database_refuses_to_change_a_vote(store: Store, url: str) -> None:
    store.add("emoji", entrants(1))
    shown = store.draw()
    store.vote(shown.session, shown.pair, "left")
    engine = sa.create_engine(url)
    for change in (VOTES.update().values(choice="right"), VOTES.delete()):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(change)
    engine.dispose()
    assert len(store.votes()) == 1


def test_an_older_store_is_brought_up_to_date_with_its_votes(url: str) -> None:
    Database(url, revision="0001").close()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO sessions VALUES (1, 'aaaa', 1.0)",
            "INSERT INTO pictures VALUES (1, 'k1', 'emoji', 'base', 'a cat', 3, 1.0)",
            "INSERT INTO pictures VALUES (2, 'k2', 'emoji', 'plush', 'a cat', 3, 1.0)",
            "INSERT INTO pairs VALUES (1, 'bbbb', 'emoji', 1, 2)",
            "INSERT INTO showings VALUES (1, 1, true, 1.0)",
            "INSERT INTO votes VALUES (1, 1, 1, 'left', 2.0)",
        ):
            connection.execute(sa.text(statement))
    store = open_store(ArenaConfig(url=url))
    (vote,) = store.votes()
    assert (vote.left, vote.right, vote.winner, vote.left_clip) == ("plush", "base", "plush", None)
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []  # nothing left to migrate
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    store.close()
    with pytest.raises(StorageUnavailable, match="made by a newer Lorafleet"):
        open_store(ArenaConfig(url=url))


def test_stores_opened_at_once_do_not_get_in_each_others_way(url: str) -> None:
    stores: list[Store] = []
    threads = [threading.Thread(target=lambda: stores.append(open_store(ArenaConfig(url=url)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.pools() for store in stores] == [{}] * 4
    for store in stores:
        store.close()


def test_what_is_no_picture_or_no_database_is_said(tmp_path: Path) -> None:
    store = open_store(ArenaConfig(url=f"sqlite:///{tmp_path}/a.sqlite"))
    with pytest.raises(InvalidRequest, match="whole PNG, JPEG or WebP"):
        store.add("emoji", [Entrant("base", "a cat", 1, b"GIF89a")])
    store.close()
    (tmp_path / "text").write_text("this is a note and no database, however long it may be" * 100)
    for url in (f"sqlite:///{tmp_path}/text", "postgresql://lorafleet:secret@127.0.0.1:9/none"):
        with pytest.raises(StorageUnavailable) as raised:
            open_store(ArenaConfig(url=url))
        assert "cannot be used" in raised.value.message
        assert "secret" not in raised.value.message

"""The database under the arena: SQLite or PostgreSQL, its tables brought up to date, its errors in our words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from lorafleet.core.errors import StorageUnavailable

BUSY_MS: Final = 10_000  # how long a writer waits for another one
LOCK: Final = 0x10AF1EE7  # PostgreSQL's advisory lock of whoever migrates
_WRITES: Final = "lorafleet_writes"


class Database:
    """Connections for any thread. Everything raises StorageUnavailable when the database does not answer."""

    def __init__(self, url: str, *, revision: str = "head") -> None:
        """Makes the file if there is none, and the tables up to `revision`."""
        self.name = url
        with self._in_our_words():
            address = sa.make_url(url)
            self.name = address.render_as_string(hide_password=True)
            if address.get_backend_name() == "sqlite" and address.database:
                Path(address.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine = sa.create_engine(address, pool_pre_ping=True)
            if self._engine.dialect.name == "sqlite":
                sa.event.listen(self._engine, "connect", _prepare_sqlite)
                sa.event.listen(self._engine, "begin", _begin_sqlite)
            try:
                self._migrate(revision)
            except BaseException:
                self.close()
                raise

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._in_our_words(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction: all of it or nothing."""
        with self._in_our_words(), self._engine.execution_options(**{_WRITES: True}).begin() as connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    def _migrate(self, revision: str) -> None:
        """One process at a time; another one then finds nothing left to do."""
        config = Config()
        config.set_main_option("script_location", "lorafleet.core.arena:migrations")
        with self.writing() as connection:
            if self._engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, revision)
            except CommandError as error:
                raise StorageUnavailable(
                    f"the arena's store {self.name} was made by a newer Lorafleet ({error}): upgrade this one."
                ) from error

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:  # for the store, which knows what it means
            raise
        except (SQLAlchemyError, OSError, ModuleNotFoundError) as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0].rstrip(".")
            if isinstance(error, ModuleNotFoundError):
                cause += ": pip install 'lorafleet[postgres]'"
            raise StorageUnavailable(f"the arena's store {self.name} cannot be used: {cause}.", param="url") from error


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # Python's sqlite3 would begin and end transactions on its own account
    for pragma in ("journal_mode=WAL", f"busy_timeout={BUSY_MS}", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # Immediate: who reads first and writes then would fail, not wait, where another one wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITES) else "BEGIN")

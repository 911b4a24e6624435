"""Where votes are kept."""

from pydantic import BaseModel, ConfigDict, Field

from lorafleet.core.config import home


class ArenaConfig(BaseModel):
    """The arena's store. A file of SQLite serves the processes of one machine; several machines need PostgreSQL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        default=None,
        pattern=r"^(sqlite:///.+|postgresql(\+psycopg)?://.+)$",
        description="database of votes and their pictures: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE "
        "(pip install 'lorafleet[arena,postgres]'); left out: LORAFLEET_HOME/arena.sqlite",
    )

    @property
    def database_url(self) -> str:
        return self.url or f"sqlite:///{home() / 'arena.sqlite'}"

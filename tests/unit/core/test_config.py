from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafleet.core import config
from lorafleet.core.errors import ConfigError


class Base(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = "emojixl"
    revision: str | None = None
    dtype: Literal["fp32", "fp16", "off"] = "fp32"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Base = Base()
    port: int = Field(default=8000, ge=1, le=65535)
    sizes_px: list[int] = [128]
    cache: Path | None = None
    rate: float = Field(default=1e-4, gt=0)
    low: int = 1
    high: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> "Settings":
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self


def load(tmp_path: Path, text: str = "", overrides: list[str] | None = None, **environ: str) -> Settings:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return config.load_settings(Settings, config_file=file, overrides=overrides or [], environ=environ)


def test_each_source_wins_over_the_one_before(tmp_path: Path) -> None:
    text = "port: 1001\nlow: 2\nbase: {id: from-file, dtype: fp16}\n"
    settings = load(tmp_path, text, ["port=1003"], LORAFLEET_PORT="1002", LORAFLEET_BASE__ID="from-env")
    assert settings.port == 1003
    assert settings.base == Base(id="from-env", dtype="fp16")
    assert (settings.low, settings.high) == (2, 9)


def test_nothing_given_means_the_defaults() -> None:
    assert config.load_settings(Settings, environ={"PATH": "/bin", "LORAFLEET_HOME": "/x"}) == Settings()


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("sizes_px=[64, 128]", "sizes_px", [64, 128]),
        ("rate=1e-3", "rate", 1e-3),
        ("cache=/var/cache", "cache", Path("/var/cache")),
        ("cache=null", "cache", None),
        ("base.revision=1234567", "base", Base(revision="1234567")),
        ("base.revision=12e4", "base", Base(revision="12e4")),
        ("base.revision=", "base", Base()),
        ("base.dtype=off", "base", Base(dtype="off")),
        ("base.id=a=b", "base", Base(id="a=b")),
    ],
)
def test_values_read_as_yaml_and_text_stays_text(override: str, name: str, value: object) -> None:
    settings = config.load_settings(Settings, overrides=[override], environ={})
    assert getattr(settings, name) == value
    variable, _, raw = override.partition("=")
    environ = {f"LORAFLEET_{variable.upper().replace('.', '__')}": raw}
    assert config.load_settings(Settings, environ=environ) == settings


@pytest.mark.parametrize(
    ("overrides", "environ", "message"),
    [
        (["port=99999"], {}, "port must be an integer from 1 to 65535, but the command line says 99999."),
        ([], {"PORT": "x"}, "but the environment variable LORAFLEET_PORT says 'x'."),
        ([], {"BASE__IDD": "x"}, "LORAFLEET_BASE__IDD); did you mean base.id?"),
        ([], {"NONSENSE": "x"}, "unknown setting nonsense (from the environment variable LORAFLEET_NONSENSE)"),
        (["zzz=1"], {}, "known are base, port, sizes_px"),
        (["base.dtype=bf16"], {}, "base.dtype must be one of fp32, fp16, off, but the command line says 'bf16'."),
        (["base=emojixl"], {}, "base must be a group of settings (id, revision, dtype)"),
        (["port.x=1"], {}, "port must be an integer from 1 to 65535, but the command line says {'x': 1}."),
        (["rate=0"], {}, "rate must be a number above 0"),
        (["sizes_px=[1"], {}, "is not a value in YAML"),
        (["port"], {}, "--set takes NAME=VALUE"),
        (["low=10"], {}, "low must not be above high."),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_source_and_range(
    overrides: list[str], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        config.load_settings(
            Settings, overrides=overrides, environ={f"LORAFLEET_{name}": value for name, value in environ.items()}
        )
    assert message in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 0", "run.yaml says 0."),
        ("base:\n  idd: x", "unknown setting base.idd (from "),
        ("port: [", "line 1 is not YAML"),
        ("- port", "must hold settings as `name: value` lines"),
        ("\0", "is not YAML"),
        ("# " + "x" * config.MAX_FILE_BYTES, "larger than 1 MiB"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="run.yaml") as raised:
        load(tmp_path, text)
    assert message in raised.value.message


def test_a_missing_or_binary_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings file .*No such file"):
        config.load_settings(Settings, config_file=tmp_path / "none.yaml", environ={})
    (tmp_path / "latin.yaml").write_bytes(b"base: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load_settings(Settings, config_file=tmp_path / "latin.yaml", environ={})


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    settings = Settings(base=Base(revision="12e4"), rate=1e-5, sizes_px=[1, 2], cache=Path("/ü"))
    assert load(tmp_path, config.dump(settings)) == settings


def test_home_and_required() -> None:
    assert config.home({"LORAFLEET_HOME": "/srv/fleet"}) == Path("/srv/fleet")
    assert config.home({}) == Path.home() / ".lorafleet"
    assert config.home({"LORAFLEET_HOME": ""}) == Path.home() / ".lorafleet"
    assert config.required({"LORAFLEET_REQUIRE": "helm, browser,"}) == {"helm", "browser"}

"""A new registry's first entries."""

from pathlib import Path

import pytest

from lorafleet.core.config import home
from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.core.registry_samples import seed_registry
from lorafleet.models import SAMPLE_REGISTRY

DEFAULT = RegistryConfig()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path / "home"))


def names(config: RegistryConfig) -> list[str]:
    return [entry.name for entry in open_registry(config).entries()]


def test_they_are_there_at_once_and_can_be_deleted_for_good() -> None:
    assert seed_registry(DEFAULT, SAMPLE_REGISTRY)
    registry = open_registry(DEFAULT)
    first, second = registry.entries()
    registry.pull(first.manifest)
    for entry in (first, second):
        registry.delete(entry.name)
    assert not seed_registry(DEFAULT, SAMPLE_REGISTRY)
    assert names(DEFAULT) == []
    assert {path.name for path in home().iterdir()} == {"registry", "cache"}


def test_whoever_has_a_registry_gets_none(tmp_path: Path) -> None:
    theirs = RegistryConfig(url=str(tmp_path / "theirs"))
    assert not seed_registry(theirs, SAMPLE_REGISTRY)
    assert not seed_registry(RegistryConfig(samples=False), SAMPLE_REGISTRY)
    assert not home().exists()
    assert names(theirs) == []
    (home() / "registry").mkdir(parents=True)
    assert not seed_registry(DEFAULT, SAMPLE_REGISTRY)
    assert names(DEFAULT) == []


def test_what_hinders_it_is_no_reason_not_to_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not seed_registry(DEFAULT, tmp_path / "nowhere")
    assert "the sample adapters could not be put into" in caplog.text
    assert list(home().iterdir()) == []

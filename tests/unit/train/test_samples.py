"""The adapters that travel with the samples."""

import shutil
from pathlib import Path

import pytest

from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.adapter_file import adapter_facts
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_targets import targets_of


def test_they_are_a_registrys_entries_for_the_embedded_base(
    repo: Path, tmp_path: Path, emojixl: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))
    shutil.copytree(repo / "samples" / "registry", tmp_path / "registry")
    registry = open_registry(RegistryConfig())
    assert [entry.name for entry in registry.entries()] == ["fluent-3d", "fluent-ink"]
    for entry in registry.entries():
        facts = adapter_facts(registry.pull(registry.resolve(entry.name).manifest), targets_of(emojixl))
        assert facts.base_fingerprint == emojixl.fingerprint
        assert entry.manifest.training is not None
        assert (facts.rank, facts.alpha, facts.modules) == (entry.manifest.rank, 16.0, entry.manifest.modules)

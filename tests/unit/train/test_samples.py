"""The adapters that travel with the samples."""

from pathlib import Path

import pytest

from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.core.registry_samples import seed_registry
from lorafleet.models import SAMPLE_REGISTRY
from lorafleet.sdxl.adapter_file import adapter_facts
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_targets import targets_of


def test_they_are_a_registrys_entries_for_the_embedded_base(
    repo: Path, tmp_path: Path, emojixl: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))
    assert seed_registry(RegistryConfig(), SAMPLE_REGISTRY)
    registry = open_registry(RegistryConfig())
    assert [entry.name for entry in registry.entries()] == sorted(
        folder.parent.name for folder in (repo / "samples").glob("*/train")
    )
    for entry in registry.entries():
        facts = adapter_facts(registry.pull(registry.resolve(entry.name).manifest), targets_of(emojixl))
        assert facts.base_fingerprint == emojixl.fingerprint
        assert entry.manifest.training is not None
        assert (facts.rank, facts.alpha, facts.modules) == (entry.manifest.rank, 16.0, entry.manifest.modules)

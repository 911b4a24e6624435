"""Registries on folders."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fleets import registry_at

from lorafleet.core.registry import Registry


@pytest.fixture(scope="module")
def unsafe_but_quick() -> Iterator[None]:
    """Whether a disk keeps what it said it keeps is not tested here, and thousands of writes are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture
def fleet(tmp_path: Path) -> Registry:
    return registry_at(tmp_path / "fleet")

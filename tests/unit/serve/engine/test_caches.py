"""What one start leaves on disk for the next."""

import os
from pathlib import Path

import pytest

from lorafleet.serve.engine import caches


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))


def numbers(kind: str, depends_on: object, answer: float) -> float:
    return caches.measured(kind, depends_on, lambda: {"a": answer})["a"]


def test_what_was_measured_is_measured_once_for_the_same_things() -> None:
    assert numbers("k", ["base", (64, 64)], 0.1) == 0.1
    assert numbers("k", ["base", (64, 64)], 2.0) == 0.1
    assert numbers("k", ["base", (64, 128)], 3.0) == 3.0
    assert numbers("other", ["base", (64, 64)], 4.0) == 4.0


def test_a_broken_file_is_measured_again_and_mended(caplog: pytest.LogCaptureFixture) -> None:
    numbers("k", 1, 1.0)
    (file,) = (caches.directory() / "k").iterdir()
    for broken in ("{", "[1]", '{"a": "x"}', '{"a": null}'):
        file.write_text(broken)
        assert numbers("k", 1, 2.0) == 2.0
        assert "measuring again" in caplog.text
        assert numbers("k", 1, 3.0) == 2.0


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert numbers("k", 1, 1.0) == 1.0
    assert "the next start measures again" in caplog.text


def test_what_is_compiled_is_kept_at_home_unless_the_environment_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inductor, triton = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
    for name in (inductor, triton):
        monkeypatch.setenv(name, "")  # for monkeypatch to put back what is there now
        monkeypatch.delenv(name)
    caches.keep_compiled()
    folder = tmp_path / "cache" / "engine"
    assert [os.environ[inductor], os.environ[triton]] == [str(folder / "inductor"), str(folder / "triton")]
    monkeypatch.setenv(inductor, "/elsewhere")
    caches.keep_compiled()
    assert [os.environ[inductor], os.environ[triton]] == ["/elsewhere", str(folder / "triton")]

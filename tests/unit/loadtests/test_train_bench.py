"""The training bench on a base that fits a CPU."""

import json
from pathlib import Path

import pytest
import train_bench


def test_both_loops_are_measured_and_tabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_bench, "MIN_SECONDS", 0.0)
    variants = ["diffusers: batch=2", "low: batch=1 checkpointing=true quantise=true"]
    file = tmp_path / "rows.json"
    given = [word for variant in variants for word in ("--variant", variant)]
    monkeypatch.setattr("sys.argv", ["train_bench", "--base", "tiny-random", "--json", str(file), *given])
    train_bench.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["variant"] for row in rows] == variants
    assert all(row["img_s"] > 0 and row["steps"] >= train_bench.MIN_STEPS for row in rows)
    assert rows[0]["trainable"] == rows[1]["trainable"]
    assert f"| {variants[0]} | {rows[0]['img_s']} |" in capsys.readouterr().out

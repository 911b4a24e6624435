"""The training bench on a base that fits a CPU."""

import json
from pathlib import Path

import pytest
import train_bench


@pytest.mark.nightly
def test_both_loops_are_measured_and_tabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_bench, "STEPS", 2)
    variants = ["diffusers: batch=2", "low: batch=1 checkpointing=true quantise=true"]
    rows = []
    for variant in variants:
        monkeypatch.setattr(
            "sys.argv",
            ["train_bench", "--base", "tiny-random", "--one", variant, "--lock", str(tmp_path / "lock")],
        )
        train_bench.main()
        rows.append(json.loads(capsys.readouterr().out))
    assert [row["variant"] for row in rows] == variants
    assert all(row["img_s"] > 0 for row in rows)
    assert rows[0]["trainable"] == rows[1]["trainable"]
    assert f"| {variants[0]} | 1 | {rows[0]['img_s']} |" in train_bench.table(rows)


def test_a_variant_that_fails_is_told_and_the_others_go_on() -> None:
    row = train_bench.in_process(["/bin/false"], "ours: batch=1", 10)
    assert row == {"variant": "ours: batch=1", "failed": "exit code 1"}
    assert "ours: batch=1: exit code 1" in train_bench.table([row])

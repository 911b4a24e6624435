"""Checkpoints: whole or not there, and only for the run that made them."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lorafleet.core.errors import CheckpointMismatch, TrainingFailed
from lorafleet.train.checkpoint import MANIFEST, Checkpoints, Progress, Snapshot

IDENTITY = {"base": "abc", "optimizer.lr": 1e-4, "adapter.targets": ("to_q",)}


def snapshot(step: int, size: int = 8) -> Snapshot:
    weights = {"unet.x.a": torch.full((size,), float(step))}
    state = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.5}]}
    return Snapshot(Progress(step=step, updates=step - 1), weights, optimizer=state, scaler={"scale": 2.0})


def written(folder: Path, *saved: tuple[int, float | None], keep_last: int = 2, keep_best: int = 1) -> Checkpoints:
    checkpoints = Checkpoints(folder, IDENTITY, keep_last=keep_last, keep_best=keep_best)
    for step, loss in saved:
        checkpoints.save(snapshot(step), loss=loss)
    checkpoints.wait()
    return checkpoints


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """What a full disk does: writes fail in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    found = written(tmp_path, (1, None), (2, None)).newest()
    assert found is not None
    assert found.progress == Progress(step=2, updates=1)
    assert torch.equal(found.weights["unet.x.a"], torch.full((8,), 2.0))
    assert found.optimizer["state"][0]["step"] == 3.0
    assert found.optimizer["param_groups"][0]["lr"] == 0.5
    assert found.scaler == {"scale": 2.0}
    assert found.mean is None


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    losses: list[tuple[int, float | None]] = [(1, 0.9), (2, 0.3), (3, 0.5), (4, None), (5, 0.4)]
    checkpoints = written(tmp_path, *losses, keep_last=2, keep_best=2)
    assert [found.step for found in checkpoints.found()] == [2, 4, 5]
    best = checkpoints.best()
    assert best is not None
    assert best.step == 2


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
def test_a_damaged_one_is_skipped(tmp_path: Path, name: str) -> None:
    checkpoints = written(tmp_path, (1, None), (2, None))
    damaged = tmp_path / "step-0000002" / name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    found = checkpoints.newest()
    assert found is not None
    assert found.progress.step == 1


def test_one_without_its_manifest_is_not_there(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, (1, None), (2, None))
    (tmp_path / "step-0000002" / MANIFEST).unlink()
    assert [found.step for found in checkpoints.found()] == [1]


def test_a_full_disk_leaves_the_one_before_whole(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, (1, None))
    with files_of_at_most(4096):
        checkpoints.save(snapshot(2, size=100_000))
        with pytest.raises(TrainingFailed, match=r"step-0000002 cannot be written .* those before it are whole"):
            checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    found = checkpoints.newest()
    assert found is not None
    assert found.progress.step == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"base": "xyz"}, 'base="abc", this run has "xyz"'),
        ({"optimizer.lr": 3e-4}, "optimizer.lr=0.0001, this run has 0.0003"),
        ({"adapter.targets": ("to_k",)}, r"adapter.targets=\[\"to_q\"\]"),
    ],
)
def test_another_runs_checkpoint_is_refused_by_the_settings_name(
    tmp_path: Path, changed: dict[str, object], named: str
) -> None:
    written(tmp_path, (1, None))
    with pytest.raises(CheckpointMismatch, match=named) as caught:
        Checkpoints(tmp_path, {**IDENTITY, **changed}).newest()
    assert caught.value.param == next(iter(changed))


def test_leftovers_are_cleared(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, (1, None))
    (tmp_path / "step-0000002.partial").mkdir()
    checkpoints.clear(partial_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    checkpoints.clear()
    assert not list(tmp_path.iterdir())

"""Checkpoints of a run: written in a thread, whole or not at all, with the hash of every file in the manifest.

A checkpoint is a folder `step-0000100`, made under another name and renamed when its manifest, written last, is on
disk. As every worker holds the same state and all random numbers are keyed, one worker's is everybody's.
"""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lorafleet.core.errors import CheckpointMismatch, TrainingFailed

logger = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
_PARTIAL: Final = ".partial"

Identity = Mapping[str, Any]
"""What a run must have in common with its checkpoint, by setting: plain JSON values."""


@dataclass
class Progress:
    """How far a run is. `step`: the next one to take. `updates`: steps that moved the weights."""

    step: int = 0
    updates: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    validations_without_gain: int = 0
    stopped_early: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """A run's state on the CPU. `weights`: the adapter's, by parameter; `mean`: their running mean, if there is one;
    `optimizer`, `scaler`: their `state_dict()`."""

    progress: Progress
    weights: Mapping[str, torch.Tensor]
    mean: Mapping[str, torch.Tensor] | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> Mapping[str, torch.Tensor]:
        """The weights that an adapter is made of."""
        return self.weights if self.mean is None else self.mean


@dataclass(frozen=True)
class Found:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    loss: float | None


class Checkpoints:
    """The checkpoints in one folder; one process writes them."""

    def __init__(self, folder: Path, identity: Identity, *, keep_last: int = 2, keep_best: int = 1) -> None:
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))  # as it is read back
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, snapshot: Snapshot, *, loss: float | None = None) -> None:
        """Starts to write; the one before is waited for. `loss`: of the validation at this step.

        Raises TrainingFailed if that one could not be written; checkpoints before it are as they were.
        """
        self.wait()
        self._writing = self._writer.submit(self._write, snapshot, loss)

    def wait(self) -> None:
        """Until what was begun is on disk. Raises TrainingFailed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        self._writer.shutdown()

    def found(self) -> list[Found]:
        """The whole ones, oldest first; what is left of interrupted writes is not among them."""
        checkpoints = []
        for path in sorted(self._folder.glob("step-*")):
            manifest = _read_manifest(path)
            if manifest is not None:
                checkpoints.append(Found(path, manifest["step"], manifest["loss"]))
        return checkpoints

    def best(self) -> Found | None:
        """The one of least validation loss."""
        scored = [found for found in self.found() if found.loss is not None]
        return min(scored, key=lambda found: (found.loss, found.step), default=None)

    def newest(self) -> Snapshot | None:
        """The last one whose files are what its manifest says; damaged ones are skipped with a warning.

        Raises CheckpointMismatch, naming the setting, if it is another run's.
        """
        for found in reversed(self.found()):
            snapshot = self.load(found)
            if snapshot is not None:
                return snapshot
        return None

    def load(self, found: Found) -> Snapshot | None:
        """None if it is damaged. Raises CheckpointMismatch."""
        manifest = _read_manifest(found.path)
        if manifest is None:
            return None
        self._check_identity(found.path, manifest["identity"])
        contents: dict[str, bytes] = {}
        for name, promised in manifest["files"].items():
            try:
                contents[name] = (found.path / name).read_bytes()
            except OSError as error:
                logger.warning("the checkpoint %s is skipped: %s: %s", found.path, name, error.strerror)
                return None
            if hashlib.sha256(contents[name]).hexdigest() != promised:
                logger.warning("the checkpoint %s is skipped: %s is damaged", found.path, name)
                return None
        state = torch.load(io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True)
        return Snapshot(
            progress=Progress(**state["progress"]),
            weights=load_tensors(contents["weights.safetensors"]),
            mean=load_tensors(contents["mean.safetensors"]) if "mean.safetensors" in contents else None,
            optimizer=state["optimizer"],
            scaler=state["scaler"],
        )

    def clear(self, *, partial_only: bool = False) -> None:
        """Removes what interrupted writes left, or everything."""
        for path in self._folder.glob("*"):
            if path.name.endswith(_PARTIAL) or not partial_only:
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, snapshot: Snapshot, loss: float | None) -> None:
        step = snapshot.progress.step
        path = self._folder / f"step-{step:07}"
        partial = path.with_name(path.name + _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            contents = {"weights.safetensors": save_tensors(dict(snapshot.weights)), "state.pt": _state(snapshot)}
            if snapshot.mean is not None:
                contents["mean.safetensors"] = save_tensors(dict(snapshot.mean))
            hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
            for name, data in contents.items():
                _write_file(partial / name, data)
            manifest = {"step": step, "loss": loss, "identity": self._identity, "files": hashes}
            _write_file(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
            shutil.rmtree(path, ignore_errors=True)  # of the same step, by the same numbers
            partial.rename(path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _unwritable(path, error) from error
        self._prune()

    def _prune(self) -> None:
        found = self.found()
        scored = sorted((each for each in found if each.loss is not None), key=lambda each: (each.loss, each.step))
        kept = {each.path for each in [*found[-self._keep_last :], *scored[: self._keep_best]]}
        for each in found:
            if each.path not in kept:
                shutil.rmtree(each.path, ignore_errors=True)

    def _check_identity(self, path: Path, theirs: Identity) -> None:
        for setting in sorted({*theirs, *self._identity}):
            was, now = theirs.get(setting), self._identity.get(setting)
            if was != now:
                raise CheckpointMismatch(
                    f"the checkpoint {path.parent.parent.name}/{path.name} was made with {setting}={_brief(was)}, this "
                    f"run has {_brief(now)}: set it back, or train under another name",
                    param=setting,
                )


def _state(snapshot: Snapshot) -> bytes:
    stream = io.BytesIO()
    state = {"progress": asdict(snapshot.progress), "optimizer": snapshot.optimizer, "scaler": snapshot.scaler}
    torch.save(state, stream)
    return stream.getvalue()


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if manifest.keys() >= {"step", "loss", "identity", "files"} else None


def _unwritable(path: Path, error: OSError) -> TrainingFailed:
    cure = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
    return TrainingFailed(
        f"the checkpoint {path} cannot be written ({error.strerror}), those before it are whole: {cure} and go on with "
        "--resume"
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}...{text[-12:]}"

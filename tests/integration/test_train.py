"""Runs as a person starts them: several workers, killed ones, and the same bytes whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

STEPS = 18
SETTINGS = {
    "base.device": "cpu",
    "loop.steps": STEPS,
    "loop.batch_size": 4,
    "loop.micro_batch": 2,
    "loop.seed": 7,
    "optimizer.warmup_steps": 2,
    "optimizer.lr": 1e-3,
    "checkpoint.every_steps": 5,
    "validation.every_steps": 9,
    "data.validation_share": 0.3,
}
LIMIT_S = 120


class Runs:
    """`lorafleet train` in processes of its own, with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        for number in range(8):
            image = Image.linear_gradient("L").rotate(45 * number).resize((128, 128)).convert("RGB")
            image.save(self.pictures / f"{number}.png")
            (self.pictures / f"{number}.txt").write_text(f"a grey thing, number {number}")

    def start(self, name: str, *options: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        lorafleet = str(Path(sys.executable).with_name("lorafleet"))
        settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
        command = [*before, lorafleet, "train", str(self.pictures), "--name", name, *settings, *options]
        environment = {**os.environ, "LORAFLEET_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, *options: str, before: tuple[str, ...] = ()) -> None:
        ended(self.start(name, *options, before=before))

    def steps(self, name: str) -> list[dict[str, Any]]:
        """All lines about steps so far, those of a step taken twice twice."""
        file = self.home / "runs" / name / "progress.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [entry for line in lines if line.endswith("}") and (entry := json.loads(line))["kind"] == "step"]

    def losses(self, name: str) -> Mapping[int, float]:
        return {entry["step"]: entry["loss"] for entry in self.steps(name)}

    def adapter(self, name: str) -> bytes:
        """The file without its name, which its header has."""
        return (self.home / "runs" / name / "adapter.safetensors").read_bytes().replace(name.encode(), b"?" * len(name))

    def wait_for_step(self, name: str, step: int, process: "subprocess.Popen[str]") -> None:
        until = time.monotonic() + LIMIT_S
        while not any(entry["step"] >= step for entry in self.steps(name)):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.02)


def ended(process: "subprocess.Popen[str]", code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, said
    return said


def worker_processes(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a run by one worker that nothing disturbed, called `calm`."""
    made = Runs(tmp_path_factory.mktemp("train"))
    made.run("calm")
    return made


@pytest.mark.nightly
def test_a_killed_ray_worker_changes_no_byte(runs: Runs) -> None:
    process = runs.start("kill", "--workers", "2")
    runs.wait_for_step("kill", 7, process)  # past the checkpoint of step 5, within an epoch of 3 steps
    workers = worker_processes(process)
    assert len(workers) == 2
    workers[1].kill()
    ended(process)
    taken = [entry["step"] for entry in runs.steps("kill")]
    assert len(taken) > STEPS  # some were taken twice
    assert sorted(set(taken)) == list(range(1, STEPS + 1))
    assert runs.losses("kill") == pytest.approx(runs.losses("calm"), abs=1e-5)
    assert runs.adapter("kill") == runs.adapter("calm")


@pytest.mark.nightly
def test_a_killed_run_goes_on_where_it_was_and_changes_no_byte(runs: Runs) -> None:
    process = runs.start("hard")
    runs.wait_for_step("hard", 8, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "before: go on with --resume" in ended(runs.start("hard"), code=2)
    runs.run("hard", "--resume")
    assert runs.adapter("hard") == runs.adapter("calm")


@pytest.mark.nightly
def test_two_workers_of_torchrun_see_what_one_sees(runs: Runs) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python")
    runs.run("torc", before=torchrun)
    assert runs.losses("torc") == pytest.approx(runs.losses("calm"), abs=1e-5)
    assert runs.adapter("torc") == runs.adapter("calm")


@pytest.mark.nightly
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint(runs: Runs) -> None:
    process = runs.start("soft")
    runs.wait_for_step("soft", 6, process)
    process.send_signal(signal.SIGTERM)
    said = ended(process, code=130)
    assert "its checkpoint is written: go on with --resume" in said
    stopped_at = max(runs.losses("soft"))
    assert (runs.home / "runs" / "soft" / "checkpoints" / f"step-{stopped_at:07}").is_dir()
    changed = ended(runs.start("soft", "--resume", "--set", "optimizer.lr=0.01"), code=1)
    assert "was made with optimizer.lr=0.001, this run has 0.01" in changed


@pytest.mark.nightly
def test_killed_ray_and_its_driver_started_again_change_no_byte(runs: Runs) -> None:
    process = runs.start("both", "--workers", "2")
    runs.wait_for_step("both", 7, process)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        each.kill()
    psutil.wait_procs(tree, timeout=10)
    process.communicate()
    runs.run("both", "--resume", "--workers", "2")
    assert runs.adapter("both") == runs.adapter("calm")

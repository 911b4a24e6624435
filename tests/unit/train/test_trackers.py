"""Trackers that are not always installed, writing to this machine."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorafleet.core.errors import ConfigError
from lorafleet.train.watch import Mlflow, SampleReport, WeightsAndBiases

SETTINGS: dict[str, Any] = {"loop": {"steps": 2, "seed": 7}, "publish": False}
SAMPLES = SampleReport(2, ("a dog",), (Image.new("RGB", (8, 8), "red"),), None)


def test_mlflow_keeps_settings_numbers_and_pictures_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'lorafleet[mlflow]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = (tmp_path / "runs").as_uri()
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match=r"^watch\.mlflow_uri=file:.* cannot be used: [^\n]*$"):
        Mlflow(uri, "crayon", SETTINGS)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = Mlflow(uri, "crayon", SETTINGS)
    tracker.numbers({"train/loss": 0.5}, 1)
    tracker.numbers({"train/loss": 0.25, "validation/loss": 0.75}, 2)
    tracker.images(SAMPLES)
    tracker.close()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("lorafleet")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "crayon"
    assert run.data.params == {"loop.steps": "2", "loop.seed": "7", "publish": "False"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (1, 0.5),
        (2, 0.25),
    ]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == ["samples/0000002-0.png"]


@pytest.mark.nightly
def test_weights_and_biases_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'lorafleet[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = WeightsAndBiases("lorafleet", "crayon", SETTINGS, tmp_path)
    tracker.numbers({"train/loss": 0.5}, 1)
    tracker.images(SAMPLES)
    tracker.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    assert b"train/loss" in record.read_bytes()
    assert list((folder / "files" / "media" / "images").glob("samples_*.png"))

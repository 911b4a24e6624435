"""`lorafleet train` as it is typed; what it does is tested with the run."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lorafleet.cli.main import app
from lorafleet.core.config import load_settings
from lorafleet.core.errors import ConfigError, InvalidRequest
from lorafleet.train.config import TrainConfig


def said(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["train", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_the_printed_settings_are_those_that_were_given_and_read_back_the_same(tmp_path: Path) -> None:
    page = said("--print-config", "--set", "optimizer.lr=3e-4", "--workers", "2")
    settings = yaml.safe_load(page)
    assert (settings["optimizer"]["lr"], settings["run"]["workers"]) == (3e-4, 2)
    file = tmp_path / "run.yaml"
    file.write_text(page)
    assert said("--print-config", "--config", str(file)) == page
    defaults = load_settings(TrainConfig, environ={})
    assert (defaults.adapter.rank, defaults.adapter.alpha, defaults.adapter.dropout) == (8, 16, 0.1)
    assert defaults.adapter.targets == ("to_k", "to_q", "to_v", "to_out.0")
    assert (defaults.optimizer.lr, defaults.optimizer.betas, defaults.optimizer.clip) == (1e-4, (0.9, 0.999), 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pictures"], "--name"),
        (["--name", "x"], "DATA"),
        (["pictures", "--name", "x", "--export", "onnx"], "kohya"),
        (["merge", "a:b", "c", "--name", "x"], "the weight a number"),
    ],
)
def test_bad_usage_ends_with_2(arguments: list[str], words: str) -> None:
    assert words in said(*arguments, code=2)


def test_bad_values_are_sentences() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting optimizer\.lrr .* did you mean optimizer\.lr\?"):
        said("pictures", "--name", "x", "--set", "optimizer.lrr=1")
    with pytest.raises(ConfigError, match=r"adapter\.rank must be an integer from 1 to 128"):
        said("pictures", "--name", "x", "--set", "adapter.rank=500")
    with pytest.raises(InvalidRequest, match="name must match"):
        said("pictures", "--name", "Not A Name")
    with pytest.raises(InvalidRequest, match="--method is one of linear, svd, ties, dare"):
        said("merge", "a", "b", "--name", "x", "--method", "add")


def test_every_setting_says_what_it_is() -> None:
    schema = json.loads(json.dumps(TrainConfig.model_json_schema()))
    sections = [schema, *schema["$defs"].values()]
    fields = {name: field for section in sections for name, field in section.get("properties", {}).items()}
    missing = [name for name, field in fields.items() if "description" not in field and "$ref" not in field]
    assert [name for name in missing if name not in TrainConfig.model_fields] == []

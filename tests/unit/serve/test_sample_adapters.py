"""What a newcomer's registry begins with, over HTTP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from lorafleet.core.registry import open_registry
from lorafleet.core.registry_samples import seed_registry
from lorafleet.models import SAMPLE_REGISTRY
from lorafleet.sdxl.base import Base
from lorafleet.serve.config import BankConfig, EngineSettings, ServeSettings
from lorafleet.serve.pipeline import Pipeline


def test_both_are_listed_and_change_pictures_by_their_names(
    make_app: Callable[..., FastAPI],
    backend_of: Callable[[Pipeline], Any],
    client_of: Callable[[FastAPI], Any],
    emojixl: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))
    config = ServeSettings().registry
    seed_registry(config, SAMPLE_REGISTRY)
    pipeline = Pipeline(emojixl, EngineSettings(bank=BankConfig(slots=2, max_rank=8)), open_registry(config)).start()
    http = client_of(make_app(backend=backend_of(pipeline)))
    names = [adapter["name"] for adapter in http.get("/v1/adapters").json()["data"]]
    assert len(names) == 2
    body = {"prompt": "a cookie on a blue background", "seed": 1, "steps": 3}
    bodies = [body, *({**body, "adapters": [{"name": name}]} for name in names)]
    answers = [http.post("/generate", json=each, headers={"accept": "image/png"}) for each in bodies]
    pipeline.close()
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 3

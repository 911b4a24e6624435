"""`lorafleet eval promote` beside the running service: what the bare name means changes without a restart."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

from lorafleet.cli.main import app
from lorafleet.core.manifest import Manifest
from lorafleet.core.registry import Registry, open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.eval.canary import Limits
from lorafleet.eval.canary_metrics import Pages
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.promotion import Contest, Rollout, compare, contest_of, decide
from lorafleet.eval.results import Results
from lorafleet.eval.suites import load_suite
from lorafleet.sdxl.adapter_file import base_targets, check_against
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora import Adapter, LowRank
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import Targets
from lorafleet.sdxl.lora_write import write_adapter

NAME = "promoted"
PROMPTS, STEPS = 16, 6
TOO_LARGE = 72  # a rank; the service takes 64
QUICK = {"steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def targets() -> Targets:
    return base_targets(BaseConfig(device="cpu"))


@pytest.fixture(scope="module")
def good(repo: Path, targets: Targets) -> Adapter:
    (file,) = (repo / "models" / "registry" / "adapters" / "noto-sticker").glob("*/adapter.safetensors")
    return read_adapter(file, targets)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return open_registry(RegistryConfig())


@pytest.fixture(scope="module")
def push(registry: Registry, targets: Targets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    folder = tmp_path_factory.mktemp("adapters")

    def push(adapter: Adapter) -> Manifest:
        write_adapter(adapter, folder / "a.safetensors")
        return registry.push(NAME, folder / "a.safetensors", check_against(targets))

    yield push
    shutil.rmtree(folder)


def damaged(adapter: Adapter) -> Adapter:
    """Its columns in another order: as large as before, but of no use."""
    modules = {name: replace(each, a=each.a.flip(1).contiguous()) for name, each in adapter.modules.items()}
    return replace(adapter, modules={name: replace(each, alpha=12 * each.alpha) for name, each in modules.items()})


def padded(adapter: Adapter) -> Adapter:
    """The same pictures, by a larger rank than the service has room for."""

    def pad(module: LowRank) -> LowRank:
        more = TOO_LARGE - module.rank
        a = torch.cat([module.a, torch.zeros(more, module.a.shape[1], dtype=module.a.dtype)])
        b = torch.cat([module.b, torch.zeros(module.b.shape[0], more, dtype=module.b.dtype)], dim=1)
        return LowRank(a, b, module.alpha * TOO_LARGE / module.rank)

    return replace(adapter, modules={name: pad(module) for name, module in adapter.modules.items()})


def passed(good: Manifest, repo: Path) -> Results:
    """What the gate saw of the good adapter, as if the base alone had been in production."""
    sampling = {"limit": PROMPTS, "steps": STEPS, "seeds": 1}
    reference = repo / "samples" / "noto-sticker" / "held_out"
    config = EvalConfig.model_validate({"reference": reference, "sampling": sampling})
    results = compare(Contest(good, None, 1.0), load_suite("emoji"), config)
    base = replace(results.systems["base"], name="production")
    return replace(results, systems={**results.systems, "production": base})


def image(http: httpx.Client, name: str) -> bytes:
    asked = {"prompt": "a red apple", "seed": 1, **QUICK, "adapters": [{"name": name}]}
    return http.post("/generate", json=asked, headers={"accept": "image/png"}).raise_for_status().content


@pytest.fixture(scope="module")
def versions(push: object, good: Adapter) -> dict[str, Manifest]:
    return {"good": push(good), "damaged": push(damaged(good))}  # type: ignore[operator]


def test_the_damaged_one_is_refused_the_good_one_promoted_and_served_at_once(
    http: httpx.Client, registry: Registry, versions: dict[str, Manifest], repo: Path
) -> None:
    reference = repo / "samples" / "noto-sticker" / "held_out"
    common = ["--weight", "1", "--epsilon", "12", "--reference", str(reference), "--json"]
    common += ["--set", f"sampling.limit={PROMPTS}", "--set", f"sampling.steps={STEPS}", "--set", "sampling.seeds=1"]
    before = image(http, NAME)
    assert before == image(http, f"{NAME}@{versions['damaged'].version}")  # the latest

    refused = CliRunner().invoke(app, ["eval", "promote", f"{NAME}@latest", *common])
    assert refused.exit_code == 1, refused.output
    assert json.loads(refused.stdout)["decision"] == "refused"
    assert "production" not in registry.record(NAME).aliases

    promoted = CliRunner().invoke(app, ["eval", "promote", f"{NAME}@{versions['good'].version[:12]}", *common])
    assert promoted.exit_code == 0, promoted.output
    found = json.loads(promoted.stdout)
    assert found["decision"] == "promoted"
    assert found["differences"]["similarity"]["low"] > 0
    after = image(http, NAME)
    assert after == image(http, f"{NAME}@{versions['good'].version}")
    assert after != before


def test_a_canary_that_the_service_cannot_serve_is_rolled_back(
    service_url: str,
    metrics_port: int,
    registry: Registry,
    versions: dict[str, Manifest],
    push: object,
    good: Adapter,
    repo: Path,
) -> None:
    """Its pictures passed the gate; only the service knows that it has no room for such a rank."""
    registry.promote(f"{NAME}@{versions['good'].version}")
    candidate: Manifest = push(padded(good))  # type: ignore[operator]
    results = passed(versions["good"], repo)
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=service_url, timeout=60, headers={"cache-control": "no-cache"}) as client:
            while not over.is_set():
                client.post("/generate", json={"prompt": "a red apple", **QUICK, "adapters": [{"name": NAME}]})

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    rollout = Rollout(
        0.5,
        Limits(watch_s=60, requests=20),
        lambda adapter: Pages([f"http://127.0.0.1:{metrics_port}/metrics"], adapter),
        every_s=0.5,
    )
    try:
        evaluation = decide(registry, contest_of(registry, f"{NAME}@latest"), results, epsilon=12.0, rollout=rollout)
    finally:
        over.set()
        for asker in askers:
            asker.join()
    assert evaluation.decision == "rolled_back", evaluation
    assert "requests failed" in evaluation.reasons[-1]
    assert evaluation.canary is not None
    assert evaluation.canary.seconds < 60
    assert evaluation.canary.stable["errors"] == 0
    assert registry.record(NAME).aliases["production"] == {versions["good"].version: 1.0}
    assert [each.decision for each in registry.evaluations(candidate).values()] == ["rolled_back"]
    with httpx.Client(base_url=service_url, timeout=60) as client:
        assert image(client, NAME) == image(client, f"{NAME}@{versions['good'].version}")

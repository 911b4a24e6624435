"""Adapters that are loaded before anybody asks, and kept if they are pinned."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorafleet.core.manifest import Manifest
from lorafleet.core.registry import Registry, open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.adapter_file import check_against
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.config import BankConfig, Preload
from lorafleet.serve.engine.bank import AdapterBank
from lorafleet.serve.preload import Preloader

Push = Callable[[str, int], Manifest]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))
    return open_registry(RegistryConfig())


@pytest.fixture
def push(registry: Registry, emojixl: Base, tmp_path: Path) -> Push:
    targets = targets_of(emojixl)

    def push(name: str, seed: int) -> Manifest:
        file = tmp_path / "adapter.safetensors"
        write_adapter(random_adapter(targets, seed, modules=r"unet\.mid.+attn1.+"), file)
        return registry.push(name, file, check_against(targets))

    return push


@pytest.fixture
def bank(emojixl: Base) -> Iterator[AdapterBank]:
    with AdapterBank(emojixl, BankConfig(slots=3, max_rank=8)) as bank:
        yield bank


@pytest.fixture
def preloader(bank: AdapterBank, registry: Registry) -> Iterator[Preloader]:
    preloader = Preloader(bank, registry)
    yield preloader
    preloader.close()


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fill(bank: AdapterBank, emojixl: Base, count: int) -> None:
    """Others come and go."""
    targets = targets_of(emojixl)
    for seed in range(count):
        made = random_adapter(targets, 100 + seed, modules=r"unet\.mid.+attn1.+")
        bank.acquire(f"other-{seed}", lambda made=made: made, timeout_s=5).release()


def test_what_is_wanted_is_in_slots_and_stays_if_it_is_pinned(
    preloader: Preloader, bank: AdapterBank, push: Push, emojixl: Base
) -> None:
    kept, loaded = push("kept", 1).version, push("loaded", 2).version
    preloader.want([Preload(name="kept", pin=True), Preload(name="loaded")])
    eventually(lambda: bank.holds(kept) and bank.holds(loaded))
    fill(bank, emojixl, 6)
    slots, _ = bank.residents()
    assert kept in slots
    assert loaded not in slots
    assert preloader.problems == ()


def test_what_is_not_wanted_any_more_may_go(preloader: Preloader, bank: AdapterBank, push: Push, emojixl: Base) -> None:
    first, second = push("first", 1).version, push("second", 2).version
    preloader.want([Preload(name="first", pin=True)])
    eventually(lambda: bank.holds(first))
    preloader.want([Preload(name="second", pin=True)])
    eventually(lambda: bank.holds(second))

    def is_gone() -> bool:
        fill(bank, emojixl, 4)
        return first not in bank.residents()[0]

    eventually(is_gone)
    assert second in bank.residents()[0]


def test_what_cannot_be_loaded_is_told_and_the_rest_is_loaded(
    preloader: Preloader, bank: AdapterBank, push: Push
) -> None:
    good = push("good", 1).version
    preloader.want([Preload(name="goood"), Preload(name="good", pin=True)])
    eventually(lambda: bank.holds(good) and bool(preloader.problems))
    (problem,) = preloader.problems
    assert problem.startswith("goood is not preloaded: ")
    assert "good" in problem.removeprefix("goood")


def test_one_slot_stays_free_for_others(preloader: Preloader, bank: AdapterBank, push: Push, emojixl: Base) -> None:
    for number in range(3):
        push(f"p{number}", number)
    preloader.want([Preload(name=f"p{number}", pin=True) for number in range(3)])
    eventually(lambda: bool(preloader.problems))
    assert "p2 is not preloaded: 2 of 3 slots are pinned" in preloader.problems[0]
    fill(bank, emojixl, 2)

"""Who holds which slot: leases, single flight, eviction, pins, failures, and all of it at once."""

import copy
import dataclasses
import gc
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from lorafleet.core.errors import AdapterBusy, AdapterIncompatible, AdapterUnreadable, LorafleetError
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS, Adapter, LowRank
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import Targets, targets_of
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.config import BankConfig
from lorafleet.serve.engine.bank import AdapterBank, Lease

MODULES = r"unet\.mid.+attn1.+"
NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
MakeBank = Callable[..., AdapterBank]


@pytest.fixture(scope="module")
def base(emojixl: Base) -> Base:
    pipeline = copy.copy(emojixl.pipeline)
    for part in PARTS:
        pipeline.register_modules(**{part: copy.deepcopy(getattr(emojixl.pipeline, part))})
    return dataclasses.replace(emojixl, pipeline=pipeline)


@pytest.fixture(scope="module")
def targets(base: Base) -> Targets:
    return targets_of(base)


@pytest.fixture
def make_bank(base: Base) -> Iterator[MakeBank]:
    banks: list[AdapterBank] = []

    def make(**settings: object) -> AdapterBank:
        banks.append(
            AdapterBank(base, BankConfig.model_validate({"slots": 2, "max_rank": 8, "targets": MODULES, **settings}))
        )
        return banks[-1]

    yield make
    for bank in banks:
        bank.detach()


class Library:
    """Adapters by key, each told apart by its content, with a count of how often each was loaded."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self.loads: list[str] = []

    def adapter(self, key: str) -> Adapter:
        return random_adapter(
            self.targets, zlib.crc32(key.encode()), ranks=(1 + len(key) % 8,), alphas=(2.0,), modules=MODULES
        )

    def loader(self, key: str) -> Callable[[], Adapter]:
        def load() -> Adapter:
            self.loads.append(key)
            return self.adapter(key)

        return load


@pytest.fixture
def library(targets: Targets) -> Library:
    return Library(targets)


def content(bank: AdapterBank, slot: int) -> torch.Tensor:
    return bank._storage[slot].clone()


def expected(bank: AdapterBank, adapter: Adapter) -> torch.Tensor:
    """What the slot must hold, line by line, by the definition."""
    wanted = torch.zeros_like(bank._storage[0])
    for name, place in bank._layout.places.items():
        module = adapter.modules[name]
        wanted[: module.rank, place.a : place.a + place.in_features] = module.a
        wanted[: module.rank, place.b : place.b + place.out_features] = (module.b * (module.alpha / module.rank)).T
    return wanted


# --- the way into a slot ---


def test_an_adapter_is_filled_once_and_shared(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank()
    with bank.acquire("a", library.loader("a")) as one, bank.acquire("a", library.loader("a")) as two:
        assert one.slot == two.slot != 0
        assert torch.equal(content(bank, one.slot), expected(bank, library.adapter("a")))
        assert not content(bank, 0).any()
    stats = bank.stats()
    assert (library.loads, stats.fills, stats.hits, stats.leased, stats.resident) == (["a"], 1, 1, 0, 1)
    assert stats.fill_s > 0


def test_filled_slots_are_usable_from_the_next_publish_on(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank()
    with bank.acquire("a", library.loader("a")) as lease:
        assert not lease.is_published
        with pytest.raises(ValueError, match="not published"):
            bank.set_rows([[(lease.slot, 1.0)]])
        assert bank.publish() == ("a",)
        assert bank.publish() == ()
        bank.set_rows([[(lease.slot, 1.0)]])
    with pytest.raises(ValueError, match="not leased"):
        bank.set_text_rows([[(lease.slot, 1.0)]])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[]] * 3, "3 rows, the bank was made for 2"),
        ([[(0, 1.0)] * 3], "3 adapters in a row, at most 2"),
        ([[(0, float("nan"))]], "finite"),
        ([[(0, float("inf"))]], "finite"),
        ([[(-1, 1.0)]], "slot -1"),
        ([[(99, 1.0)]], "slot 99"),
    ],
)
def test_rows_that_cannot_be(make_bank: MakeBank, rows: list[list[tuple[int, float]]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_bank(rows=2, per_row=2).set_rows(rows)


def test_the_least_recently_used_slot_goes_first(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank()
    for key in ("a", "b", "a", "c"):
        bank.acquire(key, library.loader(key)).release()
    bank.acquire("a", library.loader("a")).release()
    assert library.loads == ["a", "b", "c"]
    assert bank.stats().evictions == 1
    bank.acquire("b", library.loader("b")).release()  # from CPU memory, not from its file
    assert (library.loads, bank.stats().host_hits) == (["a", "b", "c"], 1)


def test_a_smaller_adapter_leaves_nothing_of_the_larger_one(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank(slots=1)
    for key in ("1234567", "", "123", "1234567"):  # ranks 8, 1, 4, 8
        with bank.acquire(key or "none", library.loader(key)) as lease:
            assert torch.equal(content(bank, lease.slot), expected(bank, library.adapter(key)))


def test_leased_and_pinned_slots_stay(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank()
    bank.pin("a")
    bank.acquire("a", library.loader("a")).release()
    held = bank.acquire("b", library.loader("b"))
    before = content(bank, held.slot)
    with pytest.raises(AdapterBusy, match="all 2 adapter slots"):
        bank.acquire("c", library.loader("c"))
    assert torch.equal(content(bank, held.slot), before)
    held.release()
    held.release()  # once is enough
    with bank.acquire("c", library.loader("c")) as lease:
        assert lease.slot == held.slot
        assert bank.stats().pinned == 1
        assert library.loads == ["a", "b", "c"]  # the refused load was not in vain
        bank.unpin("a")
        bank.acquire("d", library.loader("d")).release()


def test_a_caller_may_wait_for_a_slot(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank(slots=1)
    held = bank.acquire("a", library.loader("a"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: bank.acquire("b", library.loader("b"), timeout_s=60))
        time.sleep(0.2)
        assert not waiting.done()
        held.release()
        waiting.result(10).release()
    with bank.acquire("a", library.loader("a")), pytest.raises(AdapterBusy):
        bank.acquire("b", library.loader("b"), timeout_s=0.01)


def test_an_error_in_between_puts_the_base_back(make_bank: MakeBank, base: Base, library: Library) -> None:
    module = base.pipeline.unet.get_submodule(NAME.removeprefix("unet."))

    def fail() -> None:
        with AdapterBank(base, BankConfig()) as bank:
            bank.acquire("a", library.loader("a"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert base.pipeline.unet.get_submodule(NAME.removeprefix("unet.")) is module


def test_cpu_memory_is_bounded(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank(slots=1)
    line_bytes = 4 * bank._layout.width
    bank.detach()
    bank = make_bank(slots=1, host_bytes=5 * line_bytes)
    for key in ("a", "b", "c", "1234567"):  # ranks 2, 2, 2 and 8: the last is over the whole budget
        bank.acquire(key, library.loader(key)).release()
    assert (bank.stats().host_adapters, bank.stats().host_bytes) == (2, 4 * line_bytes)
    bank.acquire("b", library.loader("b")).release()
    bank.acquire("a", library.loader("a")).release()
    assert library.loads == ["a", "b", "c", "1234567", "a"]


# --- several at once ---


def test_two_who_want_the_same_load_it_once(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank()
    entered, go = threading.Event(), threading.Event()

    def slow() -> Adapter:
        entered.set()
        assert go.wait(20)
        return library.loader("a")()

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(lambda: bank.acquire("a", slow))
        assert entered.wait(20)
        others = [pool.submit(lambda: bank.acquire("a", slow)) for _ in range(2)]
        with bank.acquire("b", library.loader("b")):  # a slow load holds nobody else up
            pass
        go.set()
        leases = [first.result(20), *(other.result(20) for other in others)]
    assert len({lease.slot for lease in leases}) == 1
    assert library.loads.count("a") == 1
    assert bank.stats().leased == 1
    for lease in leases:
        lease.release()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(AdapterIncompatible("wrong base"), AdapterIncompatible), (OSError("gone"), AdapterUnreadable)],
    ids=["ours", "any"],
)
def test_a_failed_load_fails_all_who_wait_and_leaves_no_trace(
    make_bank: MakeBank, library: Library, error: Exception, kind: type[LorafleetError]
) -> None:
    bank = make_bank(slots=1)
    entered, go = threading.Event(), threading.Event()

    def fail() -> Adapter:
        entered.set()
        assert go.wait(20)
        raise error

    def never() -> Adapter:
        raise AssertionError("the second one loads, too")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: bank.acquire("a", fail))
        assert entered.wait(20)
        second = pool.submit(lambda: bank.acquire("a", never))
        while not second.running():
            pass
        threading.Timer(0.05, go.set).start()
        for future in (first, second):
            with pytest.raises(kind) as caught:
                future.result(20)
            assert "wrong base" in str(caught.value) or "gone" in str(caught.value)
    stats = bank.stats()
    assert (stats.resident, stats.leased, stats.host_adapters, stats.failures) == (0, 0, 0, 1)
    bank.acquire("a", library.loader("a")).release()


def test_a_failed_fill_loses_no_slot(make_bank: MakeBank, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(slots=1)

    def fail(slot: object, lines: torch.Tensor) -> None:
        bank._storage[1].fill_(7.0)
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(bank, "_fill", fail)
        with pytest.raises(AdapterUnreadable, match="no room"):
            bank.acquire("a", library.loader("a"))
    assert bank.stats().resident == 0
    with bank.acquire("b", library.loader("b")) as lease:
        assert torch.equal(content(bank, lease.slot), expected(bank, library.adapter("b")))


def wanted(library: Library, *keys: str) -> list[tuple[str, Callable[[], Adapter]]]:
    return [(key, library.loader(key)) for key in keys]


def filled(*leases: Lease) -> None:
    deadline = time.monotonic() + 20
    while any(lease._slot.is_filling for lease in leases):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_all_slots_are_claimed_or_none(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank(slots=3)
    first = bank.claim(wanted(library, "a", "b"))
    assert first is not None
    assert bank.claim(wanted(library, "c", "d")) is None  # one slot is free, and stays so
    assert bank.claim(wanted(library, "c"), only_resident=True) is None
    again = bank.claim(wanted(library, "b", "a", "b"), only_resident=True)
    assert again is not None
    assert [lease.key for lease in again] == ["b", "a", "b"]
    filled(*first)
    assert sorted(library.loads) == ["a", "b"]
    for lease in (*first, *again):
        lease.release()
    second = bank.claim(wanted(library, "c", "d"))
    assert second is not None
    filled(*second)
    assert bank.stats().leased == 2
    for lease in second:
        lease.release()
    assert bank.stats().leased == 0


def test_a_claim_does_not_evict_what_it_shares(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank(slots=2)
    for key in ("a", "b"):
        bank.acquire(key, library.loader(key)).release()
    leases = bank.claim(wanted(library, "c", "a"))  # a is the least recently used, but wanted
    assert leases is not None
    filled(*leases)
    assert sorted(library.loads) == ["a", "b", "c"]
    for lease in leases:
        lease.release()


def test_leases_released_while_the_adapter_is_on_its_way(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank(slots=5)
    entered, go = threading.Semaphore(0), threading.Event()

    def slow(key: str) -> Callable[[], Adapter]:
        def load() -> Adapter:
            entered.release()
            assert go.wait(20)
            return library.loader(key)()

        return load

    leases = bank.claim([(key, slow(key)) for key in "abcde"])  # four are being loaded, the fifth waits for a thread
    assert leases is not None
    assert all(entered.acquire(timeout=20) for _ in range(4))
    for lease in leases:
        lease.release()
    assert bank.claim(wanted(library, "f")) is None  # nobody may have a slot that is being written to
    go.set()
    filled(*leases)
    assert sorted(library.loads) == ["a", "b", "c", "d"]
    assert (bank.stats().leased, bank.stats().resident) == (0, 4)
    bank.acquire("e", library.loader("e")).release()


def test_a_shared_lease_holds_the_slot_too(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank(slots=1)
    lease = bank.acquire("a", library.loader("a"))
    other = lease.share()
    lease.release()
    with pytest.raises(AdapterBusy, match="released"):
        lease.share()
    assert bank.claim(wanted(library, "b")) is None
    other.release()
    bank.acquire("b", library.loader("b")).release()


def test_pinned_slots_are_not_counted_on(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank(slots=2)
    assert bank.can_hold(["a", "b", "a"])
    assert not bank.can_hold(["a", "b", "c"])
    bank.pin("c")
    bank.acquire("c", library.loader("c")).release()
    assert not bank.can_hold(["a", "b"])
    assert bank.can_hold(["a", "c"])


def test_churn(make_bank: MakeBank, library: Library) -> None:
    """2,000 leases on 50 adapters through 4 slots by 3 threads, while another thread runs the model."""
    bank = make_bank(slots=4, host_bytes=20 * 8 * 4 * make_bank_width(make_bank))
    keys = [f"{i:0{1 + i % 8}d}" for i in range(50)]
    wanted = {key: expected(bank, library.adapter(key)) for key in keys}
    adapters = {key: library.adapter(key) for key in keys}
    linear: nn.Module = bank.base.pipeline.unet.get_submodule(NAME.removeprefix("unet."))
    done = threading.Event()
    busy: list[int] = []

    def use(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(667):
            key = draw.choice(keys)
            try:
                lease = bank.acquire(key, lambda key=key: adapters[key], timeout_s=draw.choice([0.0, 1.0]))  # type: ignore[misc]
            except AdapterBusy:
                busy.append(1)
                continue
            with lease:
                assert torch.equal(bank._storage[lease.slot], wanted[key])

    def step() -> None:
        x = torch.ones(2, 3, 160)
        plain = linear(x)
        while not done.is_set():
            bank.publish()
            with bank.acquire(keys[0], lambda: adapters[keys[0]], timeout_s=20) as lease:
                bank.publish()
                bank.set_rows([[(lease.slot, 1.0)], []])
                y = linear(x)
                bank.set_rows([])
                assert torch.equal(y[1], plain[1])
                module = adapters[keys[0]].modules[NAME]
                assert torch.allclose(y[0], plain[0] + module.scale * x[0] @ module.a.T @ module.b.T, atol=1e-5)
            done.wait(0.002)

    with ThreadPoolExecutor(4) as pool, torch.inference_mode(False), torch.no_grad():
        stepping = pool.submit(torch.no_grad()(step))
        users = [pool.submit(use, seed) for seed in range(3)]
        gc.collect()
        try:
            for user in users:
                user.result(60)
        finally:
            done.set()
        stepping.result(20)
    stats = bank.stats()
    assert (stats.leased, stats.failures) == (0, 0)
    assert len(busy) < 1000
    assert stats.resident <= 4
    assert stats.host_bytes <= bank.config.host_bytes
    assert stats.evictions > 500
    for slot in bank._slots[1:]:
        assert slot.refs == 0
        assert slot.key is None or torch.equal(content(bank, slot.index), wanted[slot.key])


def make_bank_width(make_bank: MakeBank) -> int:
    bank = make_bank()
    bank.detach()
    return bank._layout.width


# --- adapters that do not fit ---


def altered(targets: Targets, **changes: torch.Tensor | float) -> Adapter:
    module = random_adapter(targets, 0, ranks=(2,), modules=MODULES).modules[NAME]
    return Adapter({NAME: dataclasses.replace(module, **changes)})


def test_adapters_that_do_not_fit_fail_and_leave_their_neighbours_alone(
    make_bank: MakeBank, library: Library, targets: Targets
) -> None:
    bank = make_bank(slots=2)
    sound = library.adapter("a")
    not_here = "unet.mid_block.attentions.0.proj_in"
    cases = {
        "another base": dataclasses.replace(sound, base_fingerprint="f" * 64),
        "raise max_rank": random_adapter(targets, 0, ranks=(9,), modules=MODULES),
        f"'{not_here}'": random_adapter(targets, 0, ranks=(1,), modules=not_here),
        "no module": Adapter({}),
        "the base has 160 inputs": altered(targets, a=torch.ones(2, 4)),
        "and 160 outputs": altered(targets, b=torch.ones(160, 3)),
        "holds NaN": altered(targets, a=torch.full((2, 160), float("nan"))),
        "infinity": altered(targets, alpha=1e39),
    }
    with bank.acquire("a", lambda: sound) as lease:
        bank.publish()
        before = content(bank, lease.slot)
        for words, adapter in cases.items():
            with pytest.raises(AdapterIncompatible, match=words):
                bank.acquire("bad", lambda adapter=adapter: adapter)  # type: ignore[misc]
            assert bank.stats().resident == 1
        assert torch.equal(content(bank, lease.slot), before)
        with bank.acquire("b", library.loader("b")):
            assert bank.stats().resident == 2


def test_a_corrupt_file_fails_typed(make_bank: MakeBank, library: Library, targets: Targets, tmp_path: Path) -> None:
    bank = make_bank()
    file = tmp_path / "a.safetensors"
    write_adapter(library.adapter("a"), file)
    with bank.acquire("a", lambda: read_adapter(file, targets)) as lease:
        assert torch.equal(content(bank, lease.slot), expected(bank, library.adapter("a")))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterUnreadable):
        bank.acquire("b", lambda: read_adapter(file, targets))


def test_it_cannot_be_detached_in_use(make_bank: MakeBank, library: Library) -> None:
    bank = make_bank()
    with bank.acquire("a", library.loader("a")), pytest.raises(AdapterBusy, match="'a' is in use"):
        bank.detach()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="regular expression"):
        BankConfig(targets="(")


def test_a_module_given_in_float64_is_packed_in_the_banks_type(make_bank: MakeBank, targets: Targets) -> None:
    adapter = altered(targets)
    double = Adapter({NAME: LowRank(adapter.modules[NAME].a.double(), adapter.modules[NAME].b.double(), 2.0)})
    with make_bank().acquire("a", lambda: double):
        pass

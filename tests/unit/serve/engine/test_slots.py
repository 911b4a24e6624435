"""What wrapped linears compute, against PEFT's own layers and the plain base."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lorafleet.core.errors import ConfigError
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS, Adapter
from lorafleet.sdxl.lora_oracle import generate_with_adapters, with_adapters
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_targets import Targets, targets_of
from lorafleet.sdxl.reference import generate
from lorafleet.sdxl.text import encode_prompt
from lorafleet.serve.config import BankConfig
from lorafleet.serve.engine.adapter_pack import Place
from lorafleet.serve.engine.bank import AdapterBank, Lease
from lorafleet.serve.engine.slots import RowInputs, SlotLinear

EVERYWHERE = r"unet\.mid.+\.(attn[12]|ff|proj_(in|out))\b.*|unet\.up.+attn2.+|text_encoder(_2)?\..+"


@pytest.fixture(scope="module")
def plain(emojixl: Base) -> Base:
    return emojixl


@pytest.fixture(scope="module")
def own(emojixl: Base) -> Base:
    """A copy that may be changed."""
    pipeline = copy.copy(emojixl.pipeline)
    for part in PARTS:
        pipeline.register_modules(**{part: copy.deepcopy(getattr(emojixl.pipeline, part))})
    return dataclasses.replace(emojixl, pipeline=pipeline)


@pytest.fixture(scope="module")
def adapters(plain: Base) -> list[Adapter]:
    """Ranks 1 to 16, alphas that are not the ranks, different modules."""
    targets = targets_of(plain)
    return [
        random_adapter(targets, 0, ranks=(4,), alphas=(16,)),
        random_adapter(targets, 1, ranks=(16, 1, 8), alphas=(3, -2), modules=EVERYWHERE),
        random_adapter(targets, 2, ranks=(2,), alphas=(1,), modules=r"text_encoder\..+fc1"),
        random_adapter(targets, 3, ranks=(5,), alphas=(0.5,), modules=r"unet\..+ff\.net\.2", dtype=torch.float16),
    ]


@pytest.fixture(scope="module")
def bank(own: Base) -> Iterator[AdapterBank]:
    with AdapterBank(own, BankConfig(slots=6, max_rank=16, rows=8, text_rows=2)) as bank:
        yield bank


@pytest.fixture(params=[True, False], ids=["row by row", "batched"])
def by_row(request: pytest.FixtureRequest, own: Base, bank: AdapterBank) -> Iterator[bool]:
    """Both ways that a wrapped linear computes."""
    wrapped = [m for part in PARTS for m in getattr(own.pipeline, part).modules() if isinstance(m, SlotLinear)]
    for module in wrapped:
        module.goes_row_by_row = request.param
    yield request.param
    for module in wrapped:
        module.goes_row_by_row = True


@pytest.fixture(scope="module")
def leases(bank: AdapterBank, adapters: list[Adapter]) -> Iterator[list[Lease]]:
    leases = [bank.acquire(str(i), lambda adapter=adapter: adapter) for i, adapter in enumerate(adapters)]  # type: ignore[misc]
    assert bank.publish() == ("0", "1", "2", "3")
    yield leases
    for lease in leases:
        lease.release()


@torch.inference_mode()
def noise_of(base: Base, rows: int) -> torch.Tensor:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(sum(shape))).expand(rows, *shape)

    conditions = {"text_embeds": draw(128), "time_ids": draw(6)}
    times = torch.full((rows,), 500.0)
    return base.pipeline.unet(
        draw(4, 16, 16), times, encoder_hidden_states=draw(32, 256), added_cond_kwargs=conditions, return_dict=False
    )[0]


Mix = list[list[tuple[int, float]]]
one_row = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-1.5, -0.3, 0.0, 0.7, 1.0])), max_size=4)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=st.lists(one_row, min_size=1, max_size=3))
def test_each_row_equals_pefts_alone(
    mix: Mix, by_row: bool, plain: Base, own: Base, bank: AdapterBank, leases: list[Lease], adapters: list[Adapter]
) -> None:
    """Row by row, whatever the neighbours are; also the same adapter twice, which adds up."""
    bank.set_rows([[(leases[i].slot, weight) for i, weight in row] for row in mix])
    got = noise_of(own, len(mix))
    for row, result in zip(mix, got, strict=True):
        alone = with_adapters(plain, [(adapters[i], weight) for i, weight in row])
        assert (result - noise_of(alone, 1)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("row", [[(0, 1.0)], [(1, -0.5), (2, 0.7)], [(2, 1.0), (2, 0.5), (0, 0.1), (1, 0.0)]])
def test_text_encoders_too(
    row: list[tuple[int, float]],
    by_row: bool,
    plain: Base,
    own: Base,
    bank: AdapterBank,
    leases: list[Lease],
    adapters: list[Adapter],
) -> None:
    bank.set_text_rows([[(leases[i].slot, weight) for i, weight in row]])
    got = encode_prompt(own, "red apple on a blue background")
    alone = encode_prompt(with_adapters(plain, [(adapters[i], w) for i, w in row]), "red apple on a blue background")
    without = encode_prompt(plain, "red apple on a blue background")
    assert (got.hidden - alone.hidden).abs().max() < 1e-4
    assert (got.pooled - alone.pooled).abs().max() < 1e-4
    assert (got.hidden - without.hidden).abs().max() > 1e-2
    bank.set_text_rows([])
    assert torch.equal(encode_prompt(own, "red apple on a blue background").hidden, without.hidden)


def test_a_row_without_adapters_is_the_base_bit_for_bit(
    by_row: bool, plain: Base, own: Base, bank: AdapterBank, leases: list[Lease]
) -> None:
    bank.set_rows([[(leases[0].slot, 1.0)], [], [(leases[1].slot, 0.0)]])
    with_neighbour, without = noise_of(own, 3), noise_of(plain, 3)
    assert torch.equal(with_neighbour[1], without[1])
    assert torch.equal(with_neighbour[2], without[2])  # a weight of zero is no adapter
    assert not torch.equal(with_neighbour[0], without[0])


def test_a_row_does_not_depend_on_what_its_neighbours_use(own: Base, bank: AdapterBank, leases: list[Lease]) -> None:
    """Bit for bit on a CPU, for the same number of rows: what the engine's exact mode promises."""
    row = [(leases[1].slot, 0.7), (leases[0].slot, -0.2)]
    seen = []
    for neighbours in ([], [(leases[3].slot, 1.0)], [(lease.slot, 0.5) for lease in leases]):
        bank.set_rows([neighbours, row, neighbours])
        seen.append(noise_of(own, 3)[1])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_rows_of_the_last_batch_leave_nothing_behind(
    by_row: bool, plain: Base, own: Base, bank: AdapterBank, leases: list[Lease]
) -> None:
    bank.set_rows([[(leases[0].slot, 1.0)]] * 8)
    bank.set_rows([[]])
    assert torch.equal(noise_of(own, 8), noise_of(plain, 8))


@pytest.mark.parametrize("by_row", [True, False])
def test_a_wrapped_linear_by_hand(by_row: bool) -> None:
    """y = 2x + w * (1 * x): rank 1, A = 1, alpha/r * B = 1."""
    linear = nn.Linear(1, 1, bias=False)
    nn.init.constant_(linear.weight, 2.0)
    storage = torch.zeros(2, 1, 2)
    storage[1] = 1.0
    inputs = RowInputs(3, 2, torch.device("cpu"))
    wrapped = SlotLinear(linear, storage, Place(0, 1, 1, 1), inputs)
    wrapped.goes_row_by_row = by_row
    inputs.write([[(1, 1.0)], [], [(1, -2.0), (1, 0.5)]], [0, 1])
    x = torch.tensor([[10.0], [10.0], [10.0]])
    assert wrapped(x).flatten().tolist() == [30.0, 20.0, 5.0]  # [rows, in]
    assert wrapped(x.unsqueeze(1).expand(3, 4, 1))[:, 3, 0].tolist() == [30.0, 20.0, 5.0]  # [rows, tokens, in]
    assert wrapped(x[:1]).item() == 30.0  # fewer rows than there could be
    with pytest.raises(RuntimeError):
        wrapped(torch.ones(4, 1))  # more
    with pytest.raises(RuntimeError):
        wrapped(torch.ones(6, 1))


def test_bfloat16_stays_close_and_weights_are_not_rounded() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    storage = torch.randn(2, 8, 128) / 8
    storage[0] = 0
    results = []
    for dtype, by_row in ((torch.float64, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        inputs = RowInputs(2, 2, torch.device("cpu"))
        wrapped = SlotLinear(copy.deepcopy(linear).to(dtype), storage.to(dtype), Place(0, 64, 64, 64), inputs)
        wrapped.goes_row_by_row = by_row
        inputs.write([[(1, 0.7)], []], [0, 8])
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append(wrapped(x.to(dtype)))
    for result in results[1:]:
        assert result.dtype == torch.bfloat16
        assert (results[0] - result.double()).abs().max() < 0.05


def test_names_weights_and_types_stay(plain: Base, own: Base, bank: AdapterBank) -> None:
    for part in PARTS:
        before, after = getattr(plain.pipeline, part), getattr(own.pipeline, part)
        assert list(before.state_dict()) == list(after.state_dict())
        assert [name for name, _ in before.named_modules()] == [name for name, _ in after.named_modules()]
        assert sum(isinstance(module, SlotLinear) for module in after.modules()) > 20
        assert not any(module.training for module in after.modules())
    assert targets_of(own) == targets_of(plain)
    with pytest.raises(ConfigError, match="already"):
        AdapterBank(own, BankConfig())


def test_every_slot_is_one_piece_of_memory(bank: AdapterBank) -> None:
    (storage,) = {
        m.slot_a.untyped_storage().data_ptr() for m in bank.base.pipeline.unet.modules() if type(m) is SlotLinear
    }
    assert storage == bank._storage.untyped_storage().data_ptr()
    assert bank._storage[1].is_contiguous()


def test_detach_puts_the_very_same_modules_back(emojixl: Base, adapters: list[Adapter]) -> None:
    before = {part: list(getattr(emojixl.pipeline, part).modules()) for part in PARTS}
    expected = noise_of(emojixl, 1)
    with AdapterBank(emojixl, BankConfig(slots=1, max_rank=16, targets=r"unet\..+attn1.+|text_encoder_2\..+")) as bank:
        assert targets_of(emojixl).linears == bank.targets.linears
    for part in PARTS:
        after = list(getattr(emojixl.pipeline, part).modules())
        assert all(one is other for one, other in zip(before[part], after, strict=True))
    assert torch.equal(noise_of(emojixl, 1), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"targets": "nothing"}, "match no linear"), ({"targets": r"unet\.conv_in"}, "match no linear")],
)
def test_targets_must_match(plain: Base, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdapterBank(plain, BankConfig(**settings))


def test_weights_that_come_and_go_take_no_bank(plain: Base) -> None:
    moving = plain.config.model_copy(update={"low_memory": True})
    with pytest.raises(ConfigError, match="low_memory=false"):
        AdapterBank(dataclasses.replace(plain, config=moving, device=torch.device("cuda")), BankConfig())


def test_nothing_recompiles_when_adapters_come_and_go(own: Base, bank: AdapterBank, adapters: list[Adapter]) -> None:
    """One middle block stands for the UNet: every kind of wrapped linear, in a fifth of the time to trace."""
    block = own.pipeline.unet.mid_block.attentions[0]
    targets: Targets = bank.targets
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x, text = torch.randn(4, 160, 4, 4), torch.randn(4, 32, 256)

    def run(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(x, encoder_hidden_states=text, return_dict=False)[0]

    bank.set_rows([])
    run(compiled)
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn in range(8):
            adapter = random_adapter(targets, 10 + turn, ranks=(1 + turn,), alphas=(3.0,))
            with bank.acquire(f"turn-{turn}", lambda adapter=adapter: adapter) as lease:  # type: ignore[misc]
                bank.publish()
                for rows in ([[(lease.slot, 0.1 * turn - 0.3)]] * 4, [[], [(lease.slot, 1.0), (lease.slot, 0.5)]]):
                    bank.set_rows(rows)
                    seen.append(run(compiled))
                    assert torch.allclose(seen[-1], run(block), atol=1e-5)
            bank.set_rows([])
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(seen))


@pytest.mark.parametrize("mix", [[(0, 0.8)], [(1, 1.0), (3, -0.6), (2, 0.5)]])
def test_whole_images_equal_diffusers_with_peft(
    mix: list[tuple[int, float]],
    by_row: bool,
    plain: Base,
    own: Base,
    bank: AdapterBank,
    leases: list[Lease],
    adapters: list[Adapter],
) -> None:
    """diffusers' own pipeline over the wrapped models: two rows with guidance, one prompt at a time."""
    request = GenerationRequest(prompt="a red apple", negative_prompt="blue", steps=4, seed=5)
    row = [(leases[i].slot, weight) for i, weight in mix]
    bank.set_rows([row, row])
    bank.set_text_rows([row])
    got = np.asarray(generate(own, request)[0]).astype(int)
    bank.set_rows([])
    bank.set_text_rows([])
    alone = np.asarray(generate_with_adapters(plain, request, [(adapters[i], weight) for i, weight in mix])[0]).astype(
        int
    )
    assert np.abs(got - alone).max() <= 1
    assert np.abs(got - np.asarray(generate(plain, request)[0]).astype(int)).mean() > 2
    assert (np.asarray(generate(own, request)[0]) == np.asarray(generate(plain, request)[0])).all()

"""8-bit products of the base beside adapters in its own type; on a CPU they are computed in float32."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorafleet.core.errors import ConfigError
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.serve.config import BankConfig, EngineSettings
from lorafleet.serve.engine import Engine, Job, JobAdapter, fp8
from lorafleet.serve.engine.adapter_pack import Place
from lorafleet.serve.engine.bank import AdapterBank
from lorafleet.serve.engine.fp8 import Fp8Linear, Fp8Product, Fp8Weights, calibrate
from lorafleet.serve.engine.slots import RowInputs, SlotLinear

SIZE = 64, 64
BANK = {"slots": 1, "max_rank": 4}
BLOCK = "mid_block.attentions.0"
JOB = Job(GenerationRequest(prompt="a rocket on a white background", width=64, height=64, steps=3), seed=3)


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with fp8.emulated():
        yield


@pytest.fixture(scope="module")
def amax(emojixl: Base) -> dict[str, float]:
    return calibrate(emojixl, SIZE)


def engine_of(base: Base, **settings: object) -> Engine:
    """One that is not started."""
    return Engine(base, EngineSettings.model_validate({"warm_sizes": [SIZE], **settings}))


def image_of(engine: Engine, job: Job = JOB) -> Any:
    handle = engine.submit(job)
    engine.run_until_idle()
    return np.asarray(handle.result().image).astype(int)


def product_of(weight: torch.Tensor, largest: float) -> Fp8Product:
    return Fp8Product(weight, torch.tensor(largest / fp8.LARGEST), emulates=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64)])
def test_a_product_is_close_to_the_linears(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """3 bits of mantissa are a relative error of at most 1/16 in each factor, 1/28 or so on average over both."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).to(dtype)
    x = torch.randn(*shape).to(dtype)
    with torch.no_grad():
        got, wanted = product_of(linear.weight, float(x.abs().max()))(x, linear.bias), linear(x)
    assert (got.dtype, got.shape) == (dtype, wanted.shape)
    assert got.is_contiguous()
    error = (got.float() - wanted.float()).norm() / wanted.float().norm()
    assert 0.001 < error < 0.05


def test_the_products_own_kernel_computes_the_same() -> None:
    """PyTorch has it for CPUs too, seconds slow at sizes that matter."""
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 16), torch.randn(3, 32)
    x_scale = torch.tensor(0.01)
    with torch.no_grad():
        results = [Fp8Product(linear.weight, x_scale, emulates=e)(x, linear.bias) for e in (False, True)]
    assert torch.allclose(*results, atol=1e-5)


def test_what_is_larger_than_ever_seen_is_clamped_and_nan_stays() -> None:
    product = product_of(torch.eye(16), 2.0)
    x = torch.zeros(3, 16)
    x[0, 0], x[1, 1], x[2, 2] = 50.0, -50.0, float("nan")
    y = product(x, None)
    assert y[0, 0] == pytest.approx(2.0)
    assert y[1, 1] == pytest.approx(-2.0)
    assert y[2].isnan().any()
    assert not y[:2].isnan().any()


def test_zeros_stay_zeros() -> None:
    assert torch.equal(product_of(torch.zeros(16, 16), 1.0)(torch.randn(2, 16), None), torch.zeros(2, 16))


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_see_the_quantised_input(by_row: bool, dtype: torch.dtype) -> None:
    """A base of zeros leaves only what adapters add: what they add to the numbers that the base sees."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, bias=False, dtype=dtype)
    nn.init.zeros_(linear.weight)
    storage = torch.randn(2, 4, 48).to(dtype)
    storage[0] = 0
    inputs = RowInputs(2, 1, torch.device("cpu"))
    wrapped = SlotLinear(linear, storage, Place(0, 32, 32, 16), inputs)
    wrapped.goes_row_by_row = by_row
    inputs.write([[(1, 0.7)], []], [0, 4])
    x = torch.randn(2, 5, 32).to(dtype)
    product = product_of(linear.weight, 4.0)
    seen = product.dequantised(product.quantised(x))
    with torch.no_grad():
        plain, wanted = wrapped(x), wrapped(seen)
        wrapped.product = product
        assert torch.equal(wrapped(x), wanted)
        assert torch.equal(wrapped(product.quantised(x)), wanted)
    assert 0.001 < (wanted - plain).norm() / plain.norm() < 0.05


def test_calibration_is_deterministic_and_covers_what_is_worth_it(
    emojixl: Base, amax: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))  # where nobody has kept it
    assert calibrate(emojixl, SIZE) == amax
    assert len(amax) == 7 * 10  # 7 transformers of one block each
    kinds = {path.removeprefix(BLOCK) for path in amax if path.startswith(BLOCK)}
    inner = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0")
    block = {f".transformer_blocks.0.{name}" for name in (*inner, "ff.net.0.proj", "ff.net.2")}
    assert kinds == {".proj_in", ".proj_out", *block}
    assert all(0 < largest < 1000 for largest in amax.values())
    assert not any(module._forward_pre_hooks for module in emojixl.pipeline.unet.modules())


def test_a_linear_of_odd_size_is_left_alone(own: Base, amax: dict[str, float]) -> None:
    attention = own.pipeline.unet.get_submodule(BLOCK)
    before = attention.proj_in
    attention.proj_in = nn.Linear(before.in_features, 40)
    try:
        assert set(fp8._linears(own)) == set(amax) - {f"{BLOCK}.proj_in"}
    finally:
        attention.proj_in = before


def test_linears_with_one_input_share_its_scale(own: Base, amax: dict[str, float]) -> None:
    """So that a compiler quantises it once."""
    weights = Fp8Weights(own, amax)
    attention = own.pipeline.unet.get_submodule(f"{BLOCK}.transformer_blocks.0.attn1")
    q, k, out = (module.product.x_scale for module in (attention.to_q, attention.to_k, attention.to_out[0]))
    assert q is k
    assert q is not out
    weights.close()


@pytest.mark.parametrize("bank", [None, BANK], ids=["plain", "bank"])
def test_images_change_a_little_and_closing_restores_them(own: Base, bank: dict[str, int] | None) -> None:
    modules = list(own.pipeline.unet.modules())
    names = list(own.pipeline.unet.state_dict())
    images = []
    for is_quantised in (False, True, False):
        engine = engine_of(own, fp8=is_quantised, bank=bank)
        engine.warm_up()
        engine.warm_up()  # quantises once
        images.append(image_of(engine))
        assert list(own.pipeline.unet.state_dict()) == names
        assert targets_of(own).linears
        engine.close()
        assert all(one is other for one, other in zip(modules, own.pipeline.unet.modules(), strict=True))
    before, quantised, after = images
    assert np.array_equal(before, after)
    assert 0.01 < np.abs(before - quantised).mean() < 20


def test_adapters_work_beside_it(own: Base) -> None:
    """What an adapter does to an image is the same with and without, but for what quantising does."""
    adapter = random_adapter(targets_of(own), 5, ranks=(4,), alphas=(6.0,), modules=r"unet\..+attn.+")
    with_adapter = dataclasses.replace(JOB, adapters=(JobAdapter("a", 1.0, lambda: adapter),))
    images = {}
    for is_quantised in (False, True):
        engine = engine_of(own, fp8=is_quantised, bank=BANK)
        engine.warm_up()
        assert engine.bank is not None
        with engine.bank.acquire("a", lambda: adapter, timeout_s=30):
            images[is_quantised] = image_of(engine, with_adapter), image_of(engine)
        engine.close()
    changed = np.abs(images[False][0] - images[False][1]).mean()
    assert changed > 2 * np.abs(images[True][0] - images[False][0]).mean()


@pytest.mark.parametrize("has_bank", [True, False])
def test_it_compiles_whole_and_never_again(own: Base, amax: dict[str, float], has_bank: bool) -> None:
    """One middle block stands for the UNet; while adapters swap, if there are any."""
    bank = AdapterBank(own, BankConfig(slots=1, max_rank=8, rows=4)) if has_bank else None
    weights = Fp8Weights(own, amax)
    block = own.pipeline.unet.mid_block.attentions[0]
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    x, text = torch.randn(4, 160, 4, 4), torch.randn(4, 32, 256)
    seen = []

    @torch.inference_mode()
    def run(model: Any) -> torch.Tensor:
        return model(x, encoder_hidden_states=text, return_dict=False)[0]

    try:
        run(compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for turn in range(3):
                if bank is not None:
                    adapter = random_adapter(bank.targets, turn, ranks=(1 + turn,), alphas=(3.0,))
                    with bank.acquire(str(turn), lambda adapter=adapter: adapter) as lease:  # type: ignore[misc]
                        bank.publish()
                        bank.set_rows([[(lease.slot, 0.5)], []] * 2)
                        seen.append(run(compiled))
                        # sums in another order end on other sides of an 8-bit step
                        assert (seen[-1] - run(block)).abs().mean() < 1e-2 * seen[-1].abs().mean()
                    bank.set_rows([])
                else:
                    assert (run(compiled) - run(block)).abs().mean() < 1e-2
        assert not any(torch.equal(seen[0], other) for other in seen[1:])
    finally:
        weights.close()
        if bank is not None:
            bank.detach()


def test_blocks_share_what_is_compiled(own: Base, amax: dict[str, float]) -> None:
    """No scale is a number in the code: two blocks of one kind, one compilation."""
    weights = Fp8Weights(own, amax)
    unet = own.pipeline.unet
    blocks = [unet.up_blocks[0].attentions[i].transformer_blocks[0] for i in (0, 1)]
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    try:
        with torch.inference_mode():
            x, text = torch.randn(2, 16, 160), torch.randn(2, 32, 256)
            first = blocks[0](x, encoder_hidden_states=text)
            with torch._dynamo.config.patch(error_on_recompile=True):
                second = blocks[1](x, encoder_hidden_states=text)
        assert not torch.equal(first, second)
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        weights.close()


def test_one_engine_at_a_time(own: Base, amax: dict[str, float]) -> None:
    weights = Fp8Weights(own, amax)
    with pytest.raises(ConfigError, match="close the other engine"):
        engine_of(own, fp8=True)
    weights.close()
    weights.close()
    fp8.require(own)


class TestUnfitDevices:
    @pytest.fixture(autouse=True)
    def not_emulated(self, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fp8, "_emulates", False)

    @pytest.fixture
    def on_gpu(self, own: Base, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Base]:
        """The base, said to be on a GPU of some capability."""

        def make(capability: tuple[int, int], **config: object) -> Base:
            monkeypatch.setattr(torch.version, "cuda", "13.0")
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
            of_it = own.config.model_copy(update=config)
            return dataclasses.replace(own, config=of_it, device=torch.device("cuda"), dtype=torch.bfloat16)

        return make

    def test_a_cpu(self, own: Base) -> None:
        with pytest.raises(ConfigError, match=r"the device is cpu: set engine\.fp8=false") as error:
            engine_of(own, fp8=True, bank={"slots": 1})
        assert error.value.param == "engine.fp8"
        assert not any(isinstance(module, SlotLinear | Fp8Linear) for module in own.pipeline.unet.modules())

    @pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
    def test_gpus(self, on_gpu: Callable[..., Base], capability: tuple[int, int], fits: bool) -> None:
        base = on_gpu(capability)
        if fits:
            fp8.require(base)
        else:
            with pytest.raises(ConfigError, match="Old GPU"):
                fp8.require(base)

    def test_settings_that_do_not_go_together(self, on_gpu: Callable[..., Base]) -> None:
        with pytest.raises(ConfigError, match=r"base\.low_memory"):
            fp8.require(on_gpu((9, 0), low_memory=True))
        with pytest.raises(ConfigError, match=r"base\.dtype=bfloat16"):
            fp8.require(dataclasses.replace(on_gpu((9, 0)), dtype=torch.float32))

"""A training step on a GPU: our kernels and what is compiled, against the plain step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lorafleet.sdxl.base import load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.train.adapter import attach
from lorafleet.train.config import AdapterConfig, TrainConfig
from lorafleet.train.data import EncodedSet, encode_set, open_source
from lorafleet.train.fused import FusedAttention, FusedLinear
from lorafleet.train.group import Group
from lorafleet.train.loop import Trainer
from lorafleet.train.randomness import hash_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what PyTorch says while it compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "out_features", "together", "rank", "needs_dx"),
    [
        ((2, 1024, 1280), 1280, 3, 8, True),
        ((2, 77, 2048), 640, 2, 8, False),
        ((3, 50, 72), 136, 1, 4, True),
        ((1, 4096, 640), 640, 1, 64, True),
    ],
)
def test_adapted_linears_and_their_gradients(
    shape: tuple[int, int, int], out_features: int, together: int, rank: int, needs_dx: bool, p: float
) -> None:
    torch.manual_seed(0)
    features = shape[2]
    x = torch.randn(shape, device="cuda").bfloat16().requires_grad_(needs_dx)
    weights = [(torch.randn(out_features, features, device="cuda") / features**0.5).bfloat16() for _ in range(together)]
    bias = torch.randn(out_features, device="cuda").bfloat16()
    a = (torch.randn(together, rank, features, device="cuda") / features**0.5).requires_grad_()
    b = (torch.randn(together, out_features, rank, device="cuda") / rank**0.5).requires_grad_()
    rows, keys = drawn(shape[0]), drawn(together)
    given = (rows, keys) if p else (None, None)

    *outputs, _, _ = torch.ops.lorafleet.adapted_linears(x, weights, bias, a, b, *given, p, 2.0)
    changes = [torch.randn_like(y) for y in outputs]
    inputs = [x, a, b] if needs_dx else [a, b]
    gradients = torch.autograd.grad(outputs, inputs, changes)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    expected = []
    for g, weight in enumerate(weights):
        is_kept = (hash_bits(rows ^ keys[g], x[0].numel()) & 0xFFFFFF) >= int(p * (1 << 24))
        dropped = exact[0] * is_kept.view(shape) / (1 - p)
        added = dropped @ exact[1][g].T @ exact[2][g].T * 2.0
        expected.append(F.linear(exact[0], weight.double(), bias.double()) + added)
    wanted = torch.autograd.grad(expected, exact if needs_dx else exact[1:], [each.double() for each in changes])
    for ours, theirs in zip([*outputs, *gradients], [*expected, *wanted], strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EncodedSet:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        image = Image.linear_gradient("L").rotate(36 * number).resize((128, 128)).convert("RGB")
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a grey thing, number {number}")
    base = load_base(BaseConfig(device="cpu"))
    return encode_set(open_source(str(folder)), base, config().data, tmp_path_factory.mktemp("cache"))


def config(**loop: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "base": {"device": "cuda", "dtype": "bfloat16"},
            "loop": {"steps": 6, "batch_size": 4, **loop},
            "optimizer": {"warmup_steps": 0, "lr": 1e-3},
        }
    )


def trained(settings: TrainConfig, data: EncodedSet) -> tuple[list[float], Trainer]:
    """The losses of all steps; 10 images in portions of 4, so that the third is a smaller one."""
    base = load_base(settings.base)
    trainer = Trainer(settings, base, data, attach(base, settings.adapter, seed=0), Group(0, 1, base.device))
    batches = trainer.batches()
    waiting, losses = [], []
    for _ in range(settings.loop.steps):
        waiting.append(trainer.launch(batches, wants_stop=False))
        if len(waiting) > trainer.lag:
            losses.append(trainer.settle(waiting.pop(0))[0].loss)
    losses += [trainer.settle(each)[0].loss for each in waiting]
    return losses, trainer


@pytest.fixture(scope="module")
def plain(data: EncodedSet) -> tuple[list[float], Trainer]:
    return trained(config(fused=False), data)


@pytest.mark.parametrize("how", ["none", "regional", "full"])
def test_a_fused_and_compiled_run_is_the_plain_one(
    data: EncodedSet, plain: tuple[list[float], Trainer], how: str
) -> None:
    torch.compiler.reset()
    losses, trainer = trained(config(compile=how), data)
    assert trainer.lag == 1
    layers = list(trainer.adapter.layers.values())
    assert all(type(layer) is FusedLinear for layer in layers)
    processors = trainer.base.pipeline.unet.attn_processors.values()
    assert all(type(processor) is FusedAttention for processor in processors)
    assert losses == pytest.approx(plain[0], rel=2e-2)
    still = [name for name, tensor in trainer.adapter.state().items() if name.endswith(".b") and not tensor.any()]
    assert not still
    for name, tensor in trainer.base.pipeline.unet.named_parameters():
        assert tensor.requires_grad == (".lora_" in name), name


def test_linears_of_the_time_are_fused_too(data: EncodedSet) -> None:
    runs = []
    for fused in (False, True):
        plain = config(fused=fused, steps=2)
        settings = plain.model_copy(update={"adapter": AdapterConfig(targets=("time_emb_proj",))})
        runs.append(trained(settings, data))
    assert all(type(layer) is FusedLinear for layer in runs[1][1].adapter.layers.values())
    assert runs[1][0] == pytest.approx(runs[0][0], rel=2e-2)


def test_a_bad_step_is_left_out_on_the_device(data: EncodedSet) -> None:
    base = load_base(config().base)
    trainer = Trainer(config(), base, data, attach(base, config().adapter, seed=0), Group(0, 1, base.device))
    batches = trainer.batches()
    before = trainer.adapter.state()
    with torch.no_grad():
        spoilt = base.pipeline.unet.conv_in.weight[0, 0, 0, 0].clone()
        base.pipeline.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    report, _ = trainer.step(batches, wants_stop=False)
    assert not report.is_good
    assert (trainer.progress.bad_steps, trainer.progress.updates) == (1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.adapter.state().items())
    with torch.no_grad():
        base.pipeline.unet.conv_in.weight[0, 0, 0, 0] = spoilt
    report, _ = trainer.step(batches, wants_stop=False)
    assert report.is_good
    assert not all(torch.equal(tensor, before[name]) for name, tensor in trainer.adapter.state().items())


def test_compiling_does_not_begin_anew_for_a_smaller_portion(data: EncodedSet, tmp_path: Path) -> None:
    torch.compiler.reset()
    settings = config(compile="regional")
    base = load_base(settings.base)
    trainer = Trainer(settings, base, data, attach(base, settings.adapter, seed=0), Group(0, 1, base.device))
    batches = trainer.batches()
    trainer.step(batches, wants_stop=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(trainer.sampler.steps_per_epoch):
            trainer.step(batches, wants_stop=False)

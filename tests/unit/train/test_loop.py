"""The loop: what moves, what a step skips, and that going on is the same as never having stopped."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.core.errors import CheckpointMismatch, ConfigError, TrainingFailed
from lorafleet.sdxl.base import Base, load_base
from lorafleet.train.adapter import attach
from lorafleet.train.batch import Batch
from lorafleet.train.checkpoint import Checkpoints, Snapshot
from lorafleet.train.config import TrainConfig
from lorafleet.train.data import EncodedSet, encode_set, open_source
from lorafleet.train.group import Group
from lorafleet.train.loop import Trainer, fit
from lorafleet.train.run import identity
from lorafleet.train.watch import StepReport, ValidationReport

SETTINGS: dict[str, dict[str, Any]] = {
    "base": {"device": "cpu"},
    "data": {"validation_share": 0.3, "flip": True, "resolution_px": 64},
    "loop": {"steps": 6, "batch_size": 2, "micro_batch": 1},
    "optimizer": {"warmup_steps": 2, "lr": 1e-3},
    "validation": {"every_steps": 100},
}


def config(**changes: Any) -> TrainConfig:
    """SETTINGS but for `section__name=value`."""
    sections = {name: dict(values) for name, values in SETTINGS.items()}
    for key, value in changes.items():
        section, name = key.split("__")
        sections.setdefault(section, {})[name] = value
    return TrainConfig.model_validate(sections)


class Seen:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.validations: list[ValidationReport] = []
        self.starts = 0

    def before(self, trainer: Trainer) -> None:
        self.starts += 1

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def validation(self, report: ValidationReport, trainer: Trainer) -> None:
        self.validations.append(report)

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.steps]


@pytest.fixture(scope="module")
def data(emojixl: Base, tmp_path_factory: pytest.TempPathFactory) -> EncodedSet:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        image = Image.linear_gradient("L").rotate(36 * number).resize((128, 128)).convert("RGB")
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a grey thing, number {number}")
    settings = config().data
    return encode_set(open_source(str(folder)), emojixl, settings, tmp_path_factory.mktemp("cache"))


def trainer(settings: TrainConfig, data: EncodedSet) -> Trainer:
    base = load_base(settings.base)
    adapter = attach(base, settings.adapter, seed=settings.loop.seed)
    return Trainer(settings, base, data, adapter, Group(0, 1, base.device))


def checkpoints(folder: Path, made: Trainer) -> Checkpoints:
    return Checkpoints(folder, identity(made.config, made.base, made.data))


def trained(settings: TrainConfig, data: EncodedSet, folder: Path, seen: Seen | None = None) -> Snapshot:
    made = trainer(settings, data)
    return fit(made, checkpoints(folder, made), seen or Seen())


def same(left: Snapshot, right: Snapshot) -> bool:
    return all(torch.equal(tensor, right.weights[name]) for name, tensor in left.weights.items())


@pytest.mark.parametrize(
    ("text", "saves_memory"), [(False, False), (True, True)], ids=["unet", "text encoders too, gradient checkpointing"]
)
def test_every_b_moves_and_nothing_else_does(data: EncodedSet, tmp_path: Path, text: bool, saves_memory: bool) -> None:
    settings = config(adapter__text_encoders=text, loop__gradient_checkpointing=saves_memory, loop__steps=3)
    made = trainer(settings, data)
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    ours = {id(parameter) for parameter in made.parameters}
    others = {
        f"{part}.{name}": (tensor, tensor.detach().clone())
        for part in parts
        for name, tensor in getattr(made.base.pipeline, part).named_parameters()
        if id(tensor) not in ours
    }
    snapshot = fit(made, checkpoints(tmp_path, made), Seen())
    still = [name for name, tensor in snapshot.weights.items() if name.endswith(".b") and not tensor.any()]
    assert not still
    assert {name.partition(".")[0] for name in snapshot.weights} == ({*parts} - {"vae"} if text else {"unet"})
    for name, (tensor, before) in others.items():
        assert tensor.grad is None, name
        assert torch.equal(tensor, before), name


def test_memory_savings_change_no_number(data: EncodedSet, tmp_path: Path) -> None:
    plain, saving = Seen(), Seen()
    trained(config(loop__steps=2), data, tmp_path / "a", plain)
    trained(config(loop__steps=2, loop__gradient_checkpointing=True), data, tmp_path / "b", saving)
    assert saving.losses == pytest.approx(plain.losses, abs=1e-6)


@pytest.mark.parametrize(
    ("stop_at", "mean"), [(2, None), (3, 0.9)], ids=["at an epoch's end", "within an epoch, with a running mean"]
)
def test_going_on_is_the_same_as_never_having_stopped(
    data: EncodedSet, tmp_path: Path, stop_at: int, mean: float | None
) -> None:
    settings = config(checkpoint__every_steps=stop_at, optimizer__ema_decay=mean)
    whole_seen, rest_seen = Seen(), Seen()
    whole = trained(settings, data, tmp_path / "whole", whole_seen)
    assert trainer(settings, data).sampler.steps_per_epoch == 2

    first = trainer(settings, data)
    batches = first.batches()
    for _ in range(stop_at):
        first.step(batches, wants_stop=False)
    saved = checkpoints(tmp_path / "parts", first)
    saved.save(first.snapshot())
    saved.wait()
    for _ in range(2):  # a crash later than the checkpoint
        first.step(batches, wants_stop=False)
    rest = trained(settings, data, tmp_path / "parts", rest_seen)

    assert same(whole, rest)
    assert rest_seen.losses == whole_seen.losses[stop_at:]
    assert rest_seen.starts == 0
    assert rest.progress.step == whole.progress.step == 6
    if mean is not None:
        assert whole.mean is not None
        assert rest.mean is not None
        assert all(torch.equal(tensor, rest.mean[name]) for name, tensor in whole.mean.items())


def test_seeds_differ_and_repeat(data: EncodedSet, tmp_path: Path) -> None:
    seen = [Seen() for _ in range(3)]
    for i, seed in enumerate((0, 0, 1)):
        trained(config(loop__seed=seed, loop__steps=2), data, tmp_path / str(i), seen[i])
    assert seen[0].losses == seen[1].losses
    assert seen[0].losses != seen[2].losses


def test_a_step_of_nan_is_skipped_and_counted(data: EncodedSet) -> None:
    made = trainer(config(), data)
    spoilt = replace(next(made.batches()), latents=torch.full((1, 4, 8, 8), float("nan")))
    good = made.batches()
    before = made.adapter.state()

    def mixed() -> Iterator[Batch]:
        yield spoilt
        yield next(good)

    report, _ = made.step(mixed(), wants_stop=False)
    assert not report.is_good
    assert (made.progress.bad_steps, made.progress.updates, made.progress.step) == (1, 0, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.adapter.state().items())
    report, _ = made.step(good, wants_stop=False)
    assert report.is_good
    assert made.progress.bad_in_a_row == 0


def test_too_many_nans_end_the_run_with_a_sentence(data: EncodedSet, tmp_path: Path) -> None:
    made = trainer(config(loop__max_bad_steps=3), data)
    with torch.no_grad():
        made.parameters[0].fill_(float("nan"))
    with pytest.raises(
        TrainingFailed, match=r"NaN or infinite for 3 steps in a row \(to step 3\): lower optimizer\.lr"
    ):
        fit(made, checkpoints(tmp_path, made), Seen())
    assert not list(tmp_path.iterdir())


def test_patience_ends_a_run_that_does_not_get_better(data: EncodedSet, tmp_path: Path) -> None:
    settings = config(validation__every_steps=1, validation__patience=2, validation__min_delta=10.0, loop__steps=50)
    seen = Seen()
    snapshot = trained(settings, data, tmp_path, seen)
    assert snapshot.progress.stopped_early
    assert snapshot.progress.step == 3  # the first one is a gain over nothing
    assert [report.step for report in seen.validations] == [1, 2, 3]
    losses = [report.loss for report in seen.validations]
    assert all(loss is not None and 0 < loss < 2 for loss in losses)
    again = Seen()
    assert trained(settings, data, tmp_path, again).progress.step == 3  # it stays ended
    assert not again.steps


def test_a_lower_precision_keeps_float32_weights(data: EncodedSet, tmp_path: Path) -> None:
    seen, exact = Seen(), Seen()
    settings = config(base__dtype="bfloat16", loop__steps=2)
    snapshot = trained(settings, data, tmp_path / "a", seen)
    trained(config(loop__steps=2), data, tmp_path / "b", exact)
    assert {tensor.dtype for tensor in snapshot.weights.values()} == {torch.float32}
    assert seen.losses == pytest.approx(exact.losses, rel=0.05)


def test_a_smaller_portion_is_padded_to_the_others_size_and_keeps_its_losses(data: EncodedSet) -> None:
    made = trainer(config(adapter__dropout=0, loop__batch_size=4, loop__micro_batch=2), data)
    batch = next(made.batches())
    padded = batch.padded(4)
    assert [shape[0] for shape in padded.shapes] == [4] * len(batch.shapes)
    assert torch.equal(padded.latents[2:], batch.latents[1:].expand(2, -1, -1, -1))
    assert batch.padded(2) is batch
    with torch.no_grad():
        few, many = (made.denoiser.losses(each, min_snr_gamma=None) for each in (batch, padded))
    torch.testing.assert_close(many[:2], few)


def test_half_precision_scales_its_gradients_and_lowers_the_scale_when_they_overflow(data: EncodedSet) -> None:
    plain = trainer(config(), data)
    exact, _ = plain.step(plain.batches(), wants_stop=False)

    def half() -> Trainer:  # by hand: settings refuse it on a CPU, where it is slow
        base = load_base(config().base)
        base.pipeline.unet.half()
        base = replace(base, dtype=torch.float16)
        return Trainer(config(), base, data, attach(base, config().adapter, seed=0), Group(0, 1, base.device))

    made = half()
    good = made.batches()
    report, _ = made.step(good, wants_stop=False)
    assert report.is_good
    assert (report.loss, report.norm) == (pytest.approx(exact.loss, rel=0.02), pytest.approx(exact.norm, rel=0.1))
    assert made.snapshot().scaler["scale"] == 2.0**12
    spoilt = replace(next(good), latents=torch.full((1, 4, 8, 8), float("inf")))
    report, _ = made.step(iter([spoilt, next(good)]), wants_stop=False)
    assert not report.is_good
    assert made.snapshot().scaler["scale"] == 2.0**11
    again = half()
    again.restore(made.snapshot())
    assert again.scaler.get_scale() == 2.0**11


def test_a_checkpoint_of_other_settings_is_refused(data: EncodedSet, tmp_path: Path) -> None:
    trained(config(loop__steps=2), data, tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"optimizer\.lr=0\.001, this run has 0\.002"):
        trained(config(loop__steps=2, optimizer__lr=2e-3), data, tmp_path)


def test_patience_without_held_out_images_is_refused(data: EncodedSet, tmp_path: Path) -> None:
    all_trained = EncodedSet.open(data.path, validation_share=0.0)
    with pytest.raises(ConfigError, match=r"validation\.patience needs held-out images"):
        trainer(config(validation__patience=2), all_trained)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loop": {"batch_size": 4, "micro_batch": 3}}, "must be a multiple of loop.micro_batch"),
        ({"adapter": {"dora": True, "dropout": 0}}, "cannot be served"),
        ({"optimizer": {"name": "prodigy"}}, "set optimizer.lr=1"),
        ({"optimizer": {"warmup_steps": 2000}}, "above loop.steps"),
        ({"run": {"workers": 2, "min_workers": 3}}, "above run.workers"),
        ({"publish_best": True, "checkpoint": {"keep_best": 0}}, "checkpoint.keep_best"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig.model_validate(settings)

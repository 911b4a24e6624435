"""The cache against diffusers' own encoders, its name, its wholeness, and what is refused."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lorafleet.core.errors import ConfigError, DataUnreadable, LorafleetError, StorageUnavailable
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.train.data import DataConfig, EncodedSet, encode_set, open_source
from lorafleet.train.data import cache as cache_module
from lorafleet.train.data.encoder import Encoder
from lorafleet.train.data.plan import make_plan

SIZES = ((128, 128), (128, 128), (200, 120), (90, 160), (64, 64))
PLAIN = DataConfig(validation_share=0)


@pytest.fixture
def folder(make_pictures: Callable[..., Path]) -> Path:
    return make_pictures(SIZES)


def run(folder: Path, base: Base, config: DataConfig, cache: str = "cache", workers: int = 2) -> EncodedSet:
    return encode_set(open_source(str(folder)), base, config, folder.parent / cache, workers=workers)


def posterior(base: Base, image: Image.Image) -> Any:
    """diffusers' own."""
    pixels = base.pipeline.image_processor.preprocess(image)
    with torch.inference_mode():
        return base.pipeline.vae.encode(pixels).latent_dist


def test_latents_are_the_vae_s(folder: Path, emojixl: Base) -> None:
    found = run(folder, emojixl, PLAIN.model_copy(update={"flip": True}))
    scale = emojixl.pipeline.vae.config.scaling_factor
    with Image.open(folder / "1.png") as image:
        for flip in (False, True):
            expected = posterior(emojixl, ImageOps.mirror(image) if flip else image)
            stats = found.latents(1, flip=flip)
            torch.testing.assert_close(stats.mean, expected.mean[0] * scale, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(stats.std, expected.std[0] * scale, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found.latents(0).mean, found.latents(1).mean)
    stats.mean.zero_()  # a copy: the cache is not written to
    assert found.latents(1, flip=True).mean.abs().max() > 0


def test_text_is_the_pipeline_s(folder: Path, emojixl: Base) -> None:
    found = run(folder, emojixl, PLAIN.model_copy(update={"trigger": "an emoji of", "caption_variants": 5}))
    pipeline = emojixl.pipeline
    for text, caption, index in (("an emoji of a thing, number 3, red, round", 0, 3), ("", None, None)):
        hidden, _, pooled, _ = pipeline.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
        features = found.null_text if index is None else found.text(index, caption or 0)
        ids_1, ids_2 = found.null_tokens if index is None else found.tokens(index, caption or 0)
        assert torch.equal(features.prompt_embeds, hidden[0])
        assert torch.equal(features.pooled, pooled[0])
        for ids, tokenizer in ((ids_1, pipeline.tokenizer), (ids_2, pipeline.tokenizer_2)):
            whole = tokenizer(text, padding="max_length", max_length=40, return_tensors="pt").input_ids[0]
            assert torch.equal(ids, whole)
    assert not torch.equal(ids_1, ids_2)  # each pads in its own way
    assert found.items[3].captions == 5
    wordings = {tuple(found.tokens(3, caption)[0].tolist()) for caption in range(5)}
    assert len(wordings) > 1


def test_an_empty_caption_is_zeros_where_the_base_was_trained_so(folder: Path) -> None:
    base = load_base(BaseConfig(device="cpu"))
    base.pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    found = run(folder, base, PLAIN)
    assert found.null_text.prompt_embeds.abs().max() == 0 == found.null_text.pooled.abs().max()


def test_micro_conditioning_says_what_was_done(folder: Path, emojixl: Base) -> None:
    found = run(folder, emojixl, PLAIN.model_copy(update={"crops": 2, "crop_zoom": 1.5}))
    assert [item.bucket for item in found.items] == [(128, 128), (128, 128), (160, 96), (96, 160), (128, 128)]
    assert found.micro(0) == (128, 128, 0, 0, 128, 128)
    assert found.micro(2) == (120, 200, 0, 0, 96, 160)
    assert found.micro(3) == (160, 90, 5, 0, 160, 96)  # 96x171 after scaling, its middle cut out
    assert found.micro(4) == (64, 64, 0, 0, 128, 128)
    height, width, top, left, *target = found.micro(2, 1)
    assert (height, width, target) == (120, 200, [96, 160])
    assert found.latents(2, 1).mean.shape == (4, 12, 20)
    assert (top, left) != (0, 0)
    own = emojixl.pipeline._get_add_time_ids((64, 64), (0, 0), (128, 128), torch.float32, 128)
    assert own.tolist() == [[float(number) for number in found.micro(4)]]


def test_a_cut_picture_s_latents_are_of_what_micro_says(folder: Path, emojixl: Base) -> None:
    found = run(folder, emojixl, PLAIN)
    with Image.open(folder / "3.png") as image:
        expected = posterior(emojixl, image.resize((96, 171), Image.Resampling.LANCZOS).crop((0, 5, 96, 165)))
    mean = found.latents(3).mean / emojixl.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(mean, expected.mean[0], rtol=1e-4, atol=1e-4)


def test_a_base_in_bfloat16_still_has_latents_in_full_precision(folder: Path, emojixl: Base) -> None:
    rough = load_base(BaseConfig(device="cpu", dtype="bfloat16"))
    fine, found = run(folder, emojixl, PLAIN), run(folder, rough, PLAIN)
    assert found.fingerprint != fine.fingerprint
    assert found.text(0).prompt_embeds.dtype == torch.bfloat16
    torch.testing.assert_close(found.text(0).pooled.float(), fine.text(0).pooled, rtol=0.1, atol=0.1)
    assert torch.equal(found.latents(0).mean, fine.latents(0).mean)
    assert torch.equal(found.tokens(0)[1], fine.tokens(0)[1])


def test_turned_and_transparent_pictures(make_pictures: Callable[..., Path], emojixl: Base) -> None:
    folder = make_pictures(((128, 96),) * 2)
    with Image.open(folder / "0.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # shown a quarter turned
        image.save(folder / "0.png", exif=exif)
        upright = image.transpose(Image.Transpose.ROTATE_270)
    transparent = Image.new("RGBA", (128, 128), (255, 0, 0, 0))
    transparent.paste((0, 0, 255, 255), (32, 32, 96, 96))
    transparent.save(folder / "1.png")
    found = run(folder, emojixl, PLAIN)
    assert found.micro(0)[:2] == (128, 96)
    assert found.items[0].bucket == (96, 160)
    white = Image.new("RGB", (128, 128), "white")
    white.paste((0, 0, 255), (32, 32, 96, 96))
    scale = emojixl.pipeline.vae.config.scaling_factor
    for index, image in (
        (0, upright.resize((120, 160), Image.Resampling.LANCZOS).crop((12, 0, 108, 160))),
        (1, white),
    ):
        expected = posterior(emojixl, image).mean[0] * scale
        torch.testing.assert_close(found.latents(index).mean, expected, rtol=1e-4, atol=1e-4)


def files(found: EncodedSet) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in found.path.iterdir()}


def test_any_number_of_workers_writes_the_same_bytes(folder: Path, emojixl: Base) -> None:
    config = DataConfig(crops=2, flip=True, caption_variants=2)
    threads = torch.get_num_threads()
    one, three = run(folder, emojixl, config, "one", 1), run(folder, emojixl, config, "three", 3)
    assert files(one) == files(three)
    assert torch.get_num_threads() == threads


def test_a_second_run_finds_the_cache(folder: Path, emojixl: Base) -> None:
    first = run(folder, emojixl, PLAIN)
    before = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    moved = folder.rename(folder.parent / "elsewhere")
    again = run(moved, emojixl, PLAIN.model_copy(update={"validation_share": 0.4}))
    assert again.fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in again.path.iterdir()} == before
    assert sum(item.held_out for item in again.items) == 2


@pytest.mark.parametrize("change", ["picture", "caption", "setting", "base"])
def test_what_shapes_the_cache_shapes_its_name(change: str, folder: Path, emojixl: Base) -> None:
    facts = Encoder(emojixl).facts
    before = make_plan(open_source(str(folder)), facts, PLAIN).fingerprint
    config = PLAIN
    if change == "picture":
        shutil.copy(folder / "1.png", folder / "0.png")
    elif change == "caption":
        text = (folder / "metadata.jsonl").read_text()
        (folder / "metadata.jsonl").write_text(text.replace("number 0", "number zero"))
    elif change == "setting":
        config = DataConfig(validation_share=0, crops=2)
    else:
        facts = replace(facts, fingerprint="ba5e" * 16)
    assert make_plan(open_source(str(folder)), facts, config).fingerprint != before


def test_equal_pictures_are_held_out_together(make_pictures: Callable[..., Path], emojixl: Base) -> None:
    folder = make_pictures(((128, 128),) * 8)
    for number in range(1, 5):
        shutil.copy(folder / "0.png", folder / f"{number}.png")
    shares = []
    for share in (0.1, 0.25, 0.5, 0.9):
        items = run(folder, emojixl, PLAIN.model_copy(update={"validation_share": share})).items
        held_out = {item.sha256 for item in items if item.held_out}
        assert held_out
        assert not held_out & {item.sha256 for item in items if not item.held_out}
        shares.append(held_out)
    assert all(less <= more for less, more in pairwise(shares))


@pytest.mark.parametrize("how", ["a byte", "the end", "the manifest"])
def test_a_damaged_cache_is_found_out_and_made_again(
    how: str, folder: Path, emojixl: Base, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(folder, emojixl, PLAIN)
    whole = files(found)
    path = found.path / ("manifest.json" if how == "the manifest" else "latents.bin")
    data = bytearray(path.read_bytes())
    if how == "a byte":
        data[1000] ^= 1
    else:
        del data[-100:]
    path.write_bytes(data)
    with pytest.raises(DataUnreadable, match=r"the cache .* is damaged \(.*\): remove that folder\."):
        EncodedSet.open(found.path).verify()
    with caplog.at_level(logging.WARNING):
        again = run(folder, emojixl, PLAIN)
    assert "It is made again." in caplog.text
    assert files(again) == whole


def broken(folder: Path, how: str) -> str:
    """Breaks 2.png; what the message says."""
    path = folder / "2.png"
    if how == "truncated":  # the header is whole, so that only decoding finds it out
        Image.effect_noise((128, 128), 60).save(path)
        path.write_bytes(path.read_bytes()[:-400])
        return "the picture 2.png must be a whole PNG, JPEG or WebP picture: replace it or take it out."
    if how == "huge":
        Image.new("1", (5000, 4000)).save(path)
        return "the picture 2.png must have at most 16000000 pixels, got 5000x4000: replace it or take it out."
    if how == "GIF":
        Image.new("P", (9, 9)).save(path, "GIF")
        return "the picture 2.png must be a whole PNG, JPEG or WebP picture"
    path.write_bytes(b"")
    return "the picture 2.png must be a whole PNG, JPEG or WebP picture"


@pytest.mark.parametrize("how", ["truncated", "huge", "GIF", "empty"])
def test_a_bad_picture_is_named_and_nothing_is_left(how: str, folder: Path, emojixl: Base) -> None:
    words = broken(folder, how)
    with pytest.raises(DataUnreadable) as caught:
        run(folder, emojixl, PLAIN)
    assert words in caught.value.message
    assert not list(folder.parent.glob("cache/*"))


def test_a_picture_that_changes_meanwhile_is_named(folder: Path, emojixl: Base) -> None:
    encoder = Encoder(emojixl)
    plan = make_plan(open_source(str(folder)), encoder.facts, PLAIN)
    shutil.copy(folder / "1.png", folder / "0.png")
    with pytest.raises(DataUnreadable, match=r"0\.png was changed while it was being encoded: start again"):
        encoder.run(plan, len(plan.texts), PLAIN)


@pytest.mark.parametrize(("part", "words"), [("vae", "0.png"), ("text_encoder", "for the caption")])
def test_values_that_are_not_finite_are_refused(part: str, words: str, folder: Path) -> None:
    base = load_base(BaseConfig(device="cpu"))
    with torch.no_grad():
        next(getattr(base.pipeline, part).parameters()).fill_(float("nan"))
    with pytest.raises(
        DataUnreadable, match=rf"gives? NaN or infinity {'for ' if part == 'vae' else ''}{words}"
    ) as caught:
        run(folder, base, PLAIN)
    assert "set base." in caught.value.message
    assert not list(folder.parent.glob("cache/*"))


def test_one_picture_cannot_be_split(make_pictures: Callable[..., Path], emojixl: Base) -> None:
    folder = make_pictures(((128, 128),))
    with pytest.raises(ConfigError, match=r"data\.validation_share=0\.1 of one picture leaves none to train on"):
        run(folder, emojixl, DataConfig())
    assert [item.held_out for item in run(folder, emojixl, PLAIN).items] == [False]


def test_a_disk_without_room_is_known_before_any_work(
    folder: Path, emojixl: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageUnavailable, match=r"needs 0\.02 GB and its disk has 0\.00 GB free: free some space"):
        run(folder, emojixl, PLAIN)
    assert not list(folder.parent.glob("cache/*"))


def test_a_disk_that_fills_up_leaves_nothing(folder: Path, emojixl: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full in place of one of the files: writing to it ends as on a full disk."""
    opened = Path.open

    def open_(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        return opened(
            Path("/dev/full") if path.name == "latents.bin" and "x" in mode else path, "wb" if "x" in mode else mode
        )

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(StorageUnavailable, match=r"the cache .* is full \(No space left on device\): free some space"):
        run(folder, emojixl, PLAIN)
    assert not list(folder.parent.glob("cache/*"))


def test_a_folder_that_may_not_be_made_is_one_sentence(folder: Path, emojixl: Base) -> None:
    (folder.parent / "cache").write_text("a file")
    with pytest.raises(LorafleetError, match=r"the cache .*cache cannot be used \(.*\)"):
        run(folder, emojixl, PLAIN)


def test_what_a_killed_run_left_goes_after_a_day(folder: Path, emojixl: Base) -> None:
    old, young = (folder.parent / "cache" / f".unfinished-{name}" for name in ("old", "young"))
    for left in (old, young):
        left.mkdir(parents=True)
        (left / "latents.bin").write_bytes(b"x")
    yesterday = time.time() - 25 * 3600
    for path in (old / "latents.bin", old):
        os.utime(path, (yesterday, yesterday))
    run(folder, emojixl, PLAIN)
    assert not old.exists()
    assert young.exists()  # perhaps another process's, at work


def test_the_cache_is_plain_numbers(folder: Path, emojixl: Base) -> None:
    """Its layout, read without the code that wrote it."""
    found = run(folder, emojixl, PLAIN)
    lines = [json.loads(line) for line in (found.path / "items.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{number}.png" for number in range(5)]
    numbers = np.memmap(found.path / "latents.bin", dtype="<f4", mode="r")
    assert np.array_equal(numbers[: 4 * 16 * 16].reshape(4, 16, 16), found.latents(0).mean.numpy())
    assert len(numbers) == 2 * 4 * (3 * 16 * 16 + 2 * 12 * 20)

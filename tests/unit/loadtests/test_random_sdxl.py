import torch
from random_sdxl import SDXL, made_in, parts, random_base

from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_targets import find_targets
from lorafleet.sdxl.text import encode_prompt
from lorafleet.sdxl.vae import decode


def test_it_has_the_shape_of_the_published_model():
    with made_in("meta", torch.bfloat16):
        models = parts(SDXL)
    counts = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    # the numbers of elements in the files of stabilityai/stable-diffusion-xl-base-1.0
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert models["unet"].dtype == torch.bfloat16
    attention = [name for name in find_targets({"unet": models["unet"]}, "").linears if ".attn" in name]
    assert len(attention) == 560


def test_its_weights_are_the_same_every_time():
    one, other = (random_base(BaseConfig(id="tiny-random", device="cpu")) for _ in range(2))
    assert one.fingerprint == other.fingerprint
    assert torch.equal(one.pipeline.unet.conv_in.weight, other.pipeline.unet.conv_in.weight)


def test_the_prompt_and_the_pixels_are_finite_and_not_flat():
    base = random_base(BaseConfig(id="tiny-random", device="cpu", dtype="bfloat16"))
    assert base.limits.default_width_px == 64
    assert not torch.equal(encode_prompt(base, "a red apple").hidden, encode_prompt(base, "a blue car").hidden)
    pixels = decode(base, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert pixels.shape == (1, 64, 64, 3)
    assert pixels.std() > 10


def test_other_defaults_are_left_alone():
    before = torch.get_default_dtype()
    with made_in("meta", torch.float16):
        assert torch.empty(1).dtype == torch.float16
    assert torch.get_default_dtype() == before
    assert torch.empty(1).device.type == "cpu"

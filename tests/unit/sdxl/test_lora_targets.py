"""Kohya's names, against diffusers' own conversion for SDXL and by hand for other block layouts."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_targets import Targets, find_targets, kohya_name, sgm_names, targets_of

# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DEEP = ".transformer_blocks.9."


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


@pytest.fixture(scope="module")
def sdxl_targets(sdxl: UNet2DConditionModel) -> Targets:
    return find_targets({"unet": sdxl}, "")


@pytest.mark.parametrize(
    ("kohya", "name"),
    [
        ("input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("input_blocks_8_1_transformer_blocks_9_attn1_to_q", "down_blocks.2.attentions.1" + DEEP + "attn1.to_q"),
        ("middle_block_1_transformer_blocks_9_ff_net_0_proj", "mid_block.attentions.0" + DEEP + "ff.net.0.proj"),
        ("output_blocks_0_1_transformer_blocks_9_attn2_to_out_0", "up_blocks.0.attentions.0" + DEEP + "attn2.to_out.0"),
        ("output_blocks_5_1_proj_out", "up_blocks.1.attentions.2.proj_out"),
        ("down_blocks_1_attentions_0_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("out_2", "conv_out"),
    ],
)
def test_names_seen_in_published_sdxl_adapters(sdxl_targets: Targets, kohya: str, name: str) -> None:
    assert sdxl_targets.aliases[f"lora_unet_{kohya}"] == f"unet.{name}"


def test_all_attention_modules_of_sdxl_agree_with_diffusers(sdxl: UNet2DConditionModel, sdxl_targets: Targets) -> None:
    names = [name.removeprefix("unet.") for name in sdxl_targets.linears if ".attentions." in name]
    assert len(names) == 722  # 700 in 70 transformer blocks, and 22 proj_in/proj_out
    sgm = sgm_names(name.removeprefix("unet.") for name in (*sdxl_targets.linears, *sdxl_targets.convolutions))
    for name in names:
        ours = {"lora_unet_" + sgm[name].replace(".", "_") + ".alpha": 0}
        (theirs,) = _maybe_map_sgm_blocks_to_diffusers(ours, sdxl.config)
        for old, new in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            theirs = theirs.replace(old, new)  # diffusers does that in its next step
        assert theirs == kohya_name(f"unet.{name}") + ".alpha"


def test_every_module_of_emojixl_has_both_kohya_names(emojixl: Base) -> None:
    targets = targets_of(emojixl)
    paths = [name.removeprefix("unet.") for name in (*targets.linears, *targets.convolutions) if "unet." in name]
    sgm = sgm_names(paths)
    assert sgm.keys() == set(paths)
    assert len(set(sgm.values())) == len(paths)
    # one layer a block: conv_in, a layer and a downsampler, a layer ...
    assert sgm["down_blocks.1.attentions.0.proj_in"] == "input_blocks.3.1.proj_in"
    assert sgm["down_blocks.2.resnets.0.conv1"] == "input_blocks.5.0.in_layers.2"
    assert sgm["up_blocks.1.attentions.0.proj_in"] == "output_blocks.2.1.proj_in"
    assert targets.aliases["lora_unet_input_blocks_3_1_proj_in"] == "unet.down_blocks.1.attentions.0.proj_in"


def test_both_text_encoders_have_the_names_that_files_use(emojixl: Base) -> None:
    targets = targets_of(emojixl)
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        name = f"{part}.text_model.encoder.layers.0.self_attn.q_proj"
        assert targets.linears[name] == (128, 128)
        assert targets.aliases[f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj"] == name
    for part, path in targets.paths.values():
        assert isinstance(getattr(emojixl.pipeline, part).get_submodule(path), torch.nn.Linear)

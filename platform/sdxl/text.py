"""Prompts to embeddings, with both text encoders of SDXL."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lorafleet.sdxl.base import Base


@dataclass(frozen=True)
class PromptEmbedding:
    """What the UNet is told about a prompt, in the base's dtype on its device.

    `hidden`: [1, L, D], penultimate hidden states of both encoders side by side, padding not masked.
    `pooled`: [1, P], from the second encoder. `dropped_text`: the end of the prompt that did not fit, else "".
    """

    hidden: torch.Tensor
    pooled: torch.Tensor
    dropped_text: str = ""


RunEncoder = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def run_encoder(encoder: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The penultimate hidden states [1, L, d] and the first output, which of the second encoder is pooled [1, P]."""
    output = encoder(token_ids, output_hidden_states=True)
    return output.hidden_states[-2], output[0]


@torch.inference_mode()
def encode_prompt(base: Base, prompt: str, run: RunEncoder = run_encoder) -> PromptEmbedding:
    """Equals diffusers' `StableDiffusionXLPipeline.encode_prompt` bit for bit. Safe for several threads, if `run`,
    which is called for each encoder, is so."""
    pipeline = base.pipeline
    hidden: list[torch.Tensor] = []
    pooled = torch.empty(0)
    ids_1, ids_2, dropped_text = tokenize(base, prompt)
    for token_ids, encoder in ((ids_1, pipeline.text_encoder), (ids_2, pipeline.text_encoder_2)):
        penultimate, pooled = run(encoder, token_ids.to(base.device))
        hidden.append(penultimate)
    dtype = pipeline.text_encoder_2.dtype
    return PromptEmbedding(
        hidden=torch.concat(hidden, dim=-1).to(dtype=dtype, device=base.device),
        pooled=pooled,
        dropped_text=dropped_text,
    )


def encode_negative(base: Base, negative_prompt: str, positive: PromptEmbedding) -> PromptEmbedding:
    """The other side of guidance: zeros for an empty prompt where the base was trained so, as SDXL was."""
    if not negative_prompt and base.pipeline.config.force_zeros_for_empty_prompt:
        return PromptEmbedding(torch.zeros_like(positive.hidden), torch.zeros_like(positive.pooled))
    return encode_prompt(base, negative_prompt)


def tokenize(base: Base, prompt: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Token ids of both tokenizers, each [1, L], int64, padded, and what of the prompt does not fit, or ""."""
    pipeline = base.pipeline
    with base.tokenizer_lock:  # fast tokenizers raise "Already borrowed" when two threads share one
        ids_1, dropped_1 = _tokenize(pipeline.tokenizer, prompt)
        ids_2, dropped_2 = _tokenize(pipeline.tokenizer_2, prompt)
    return ids_1, ids_2, max(dropped_1, dropped_2, key=len)


def _tokenize(tokenizer: Any, prompt: str) -> tuple[torch.Tensor, str]:
    window = tokenizer.model_max_length
    token_ids = tokenizer(
        prompt, padding="max_length", max_length=window, truncation=True, return_tensors="pt"
    ).input_ids
    whole = tokenizer(prompt, return_offsets_mapping=True)
    if len(whole.input_ids) <= window:
        return token_ids, ""
    first_dropped = whole.offset_mapping[window - 1]  # the window's last place is the end token's
    return token_ids, prompt[first_dropped[0] :]

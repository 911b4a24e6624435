"""An adapter in memory: the one form that every file format is read into and written from.

A module is named as LoRA files name it, by part and diffusers' path: `unet.mid_block.attentions.0.proj_in`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. transformers 5 dropped the `text_model.` of the first
text encoder, files keep it; `lorafleet.sdxl.lora_targets` knows where a name lies in the loaded base.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

PARTS: Final = ("unet", "text_encoder", "text_encoder_2")
MAX_RANK: Final = 128
MAX_HEADER_BYTES: Final = 1 << 20


@dataclass(frozen=True, eq=False)
class LowRank:
    """What one linear gets added: `alpha / rank * b @ a`.

    `a`: [rank, in], `b`: [out, rank], both as stored (float16, bfloat16 or float32), on the CPU, contiguous.
    """

    a: torch.Tensor
    b: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA: its modules by name, and what its file says about itself. Its tensors are not to be changed.

    `base_fingerprint` is that of the base it was trained on, None where the file does not say.
    """

    modules: Mapping[str, LowRank]
    name: str = ""
    trigger_words: tuple[str, ...] = ()
    base_fingerprint: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(module.rank for module in self.modules.values())

    def digest(self) -> str:
        """sha256 over names, types, shapes, bytes and alphas: the same in every file format. 64 hex digits."""
        digest = hashlib.sha256()
        for name in sorted(self.modules):
            module = self.modules[name]
            shapes = [str(module.a.dtype), list(module.a.shape), str(module.b.dtype), list(module.b.shape)]
            digest.update(json.dumps([name, module.alpha, *shapes]).encode())
            digest.update(tensor_bytes(module.a))
            digest.update(tensor_bytes(module.b))
        return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The elements in row order, in the machine's byte order (little-endian, as safetensors has it)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

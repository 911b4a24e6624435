"""How well pictures fit texts, by a CLIP model: 100 times the cosine of their embeddings, nothing clipped.

The base's own `scorer/` folder holds one where it has one (emojixl does); its text encoders are not asked, they made
the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from lorafleet.core.errors import BaseUnreadable

SCORER_FOLDER: Final = "scorer"


def clip_scores(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Of pairs: unit vectors [B, P] and [B, P] -> [B], -100 to 100 (https://arxiv.org/abs/2104.08718 without its factor
    and its clipping at zero, which hides mismatches)."""
    return 100 * (images * texts).sum(-1)


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """Embeddings as unit vectors, float32 on the CPU, whatever the device that computes them."""

    model: Any
    processor: Any
    device: torch.device
    batch: int = 32

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """A CLIP model in transformers' layout. Raises BaseUnreadable."""
        try:
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device).eval()
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a damaged folder makes transformers or safetensors raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BaseUnreadable(f"the scorer in {folder} does not load: {reason[0]}") from error
        return cls(model, processor, device)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """[B, P]"""
        found = []
        for at in range(0, len(images), self.batch):
            pixels = self.processor(images=list(images[at : at + self.batch]), return_tensors="pt")["pixel_values"]
            found.append(self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output)
        return F.normalize(torch.concat(found).float(), dim=-1).cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[B, P]; what is longer than the model's window is cut, its end token kept."""
        window = self.model.config.text_config.max_position_embeddings
        found = []
        for at in range(0, len(texts), self.batch):
            tokens = self.processor(
                text=list(texts[at : at + self.batch]),
                padding="max_length",
                max_length=window,
                truncation=True,
                return_tensors="pt",
            )
            found.append(self.model.get_text_features(input_ids=tokens["input_ids"].to(self.device)).pooler_output)
        return F.normalize(torch.concat(found).float(), dim=-1).cpu()


def scorer_of(root: Path, device: torch.device) -> ClipScorer | None:
    """The scorer of the base in folder `root`, None where it has none. Raises BaseUnreadable."""
    folder = root / SCORER_FOLDER
    return ClipScorer.load(folder, device) if folder.is_dir() else None

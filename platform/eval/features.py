"""The model that looks at pictures and texts: any CLIP or SigLIP in transformers' layout, or the base's own scorer."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from PIL import Image
from safetensors import safe_open

from lorafleet.core.errors import BaseNotFound, BaseUnreadable, ConfigError
from lorafleet.eval.config import EvalConfig
from lorafleet.sdxl.base import DTYPES, resolve_device
from lorafleet.sdxl.clip_score import SCORER_FOLDER, ClipScorer
from lorafleet.sdxl.folder import BaseFolder, find_base

logger = logging.getLogger(__name__)

EMBEDDING: Final = "token_embedding.weight"
MLPERF_SHAPE: Final = (512, 224, 32)
"""Projection, image and patch sizes of ViT-B/32."""


@dataclass(frozen=True, eq=False)
class FeatureModel:
    """Unit vectors of pictures and texts, float32 on the CPU. `about`: what stands beside every number it leads to."""

    scorer: ClipScorer
    about: dict[str, Any]

    @classmethod
    def load(cls, config: EvalConfig) -> Self:
        """Raises ConfigError, BaseNotFound or BaseUnreadable. Warns where the numbers would flatter or mislead."""
        wanted = config.scorer
        base = find_base(config.base)
        device = resolve_device(config.base.device)
        dtype = torch.float32 if wanted.dtype == "auto" else DTYPES[wanted.dtype]
        place, revision, name = _place(config, base)
        model, processor = _read(place, revision, dtype, name)
        scorer = ClipScorer(model.to(device).eval(), processor, device, wanted.batch_size)
        about = {
            "model": name,
            "revision": revision or getattr(model.config, "_commit_hash", None),
            "weights_sha256": _digest(model),
            "dtype": str(dtype).removeprefix("torch."),
            "image_px": _image_px(model),
            "window_tokens": model.config.text_config.max_position_embeddings,
            "is_own_text_encoder": _is_own(model, base),
        }
        if about["is_own_text_encoder"]:
            logger.warning(
                "the scorer %s is one of the base's own text encoders: it scores pictures by what drew them, so take "
                "another one (scorer.model) for numbers that are to be believed",
                name,
            )
        if wanted.definition == "mlperf" and _shape(model) != MLPERF_SHAPE:
            logger.warning(
                "scorer.definition=mlperf with %s, which is no ViT-B/32: the numbers do not compare with MLPerf's "
                "(set scorer.model=openai/clip-vit-base-patch32)",
                name,
            )
        return cls(scorer, about)

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """[n, P]"""
        return self.scorer.images(images)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[n, P]; what is longer than the window is cut, its end token kept."""
        return self.scorer.texts(texts)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which ones are cut."""
        tokenizer = getattr(self.scorer.processor, "tokenizer", self.scorer.processor)
        return [len(tokenizer(text, verbose=False).input_ids) > self.about["window_tokens"] for text in texts]

    def size_warnings(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        """What becomes of pictures of these (width, height) before the model sees them, where it is not the usual."""
        warnings = []
        seen = self.about["image_px"]
        small = [size for size in sizes if min(size) < seen]
        if small:
            warnings.append(f"{len(small)} of {len(sizes)} pictures ({_sized(small[0])}) are enlarged to {seen} px")
        oblong = [size for size in sizes if max(size) > 1.05 * min(size)]
        if oblong:
            warnings.append(
                f"{len(oblong)} of {len(sizes)} pictures ({_sized(oblong[0])}) are cut to a square or squeezed"
            )
        return warnings


def _place(config: EvalConfig, base: BaseFolder) -> tuple[Path | str, str | None, str]:
    """Folder or hub id, revision, and the name that others see."""
    wanted = config.scorer
    if wanted.model == "base":
        folder = base.root / SCORER_FOLDER
        if not folder.is_dir():
            raise ConfigError(
                f"the base {config.base.id} has no {SCORER_FOLDER}/ folder: set scorer.model to a folder or hub id, "
                "such as openai/clip-vit-base-patch32",
                param="scorer.model",
            )
        return folder, None, f"{config.base.id}/{SCORER_FOLDER}"
    folder = Path(wanted.model).expanduser()
    if folder.is_dir():
        if wanted.revision is not None:
            raise ConfigError(f"scorer.model is the folder {folder}: leave its revision out", param="scorer.revision")
        return folder, None, folder.name
    if wanted.model.count("/") != 1 or wanted.model.startswith((".", "/")):
        raise BaseNotFound(f"there is no scorer folder {folder}", param="scorer.model")
    return wanted.model, wanted.revision, wanted.model


def _read(place: Path | str, revision: str | None, dtype: torch.dtype, name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    is_folder = isinstance(place, Path)
    try:
        model = AutoModel.from_pretrained(
            place, revision=revision, dtype=dtype, use_safetensors=True, local_files_only=is_folder
        )
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(f"a {type(model).__name__} embeds no pictures and texts")
        processor = AutoProcessor.from_pretrained(place, revision=revision, local_files_only=is_folder)
    except Exception as error:  # whatever a folder that is none makes transformers or the hub's client raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = BaseUnreadable if is_folder else BaseNotFound
        raise kind(f"the scorer {name} does not load: {reason}", param="scorer.model") from error
    return model, processor


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
    return digest.hexdigest()


def _image_px(model: Any) -> int:
    size = model.config.vision_config.image_size
    return int(size if isinstance(size, int) else min(size))


def _shape(model: Any) -> tuple[int, int, int]:
    return getattr(model.config, "projection_dim", 0), _image_px(model), model.config.vision_config.patch_size


def _is_own(model: torch.nn.Module, base: BaseFolder) -> bool:
    """Whether a text encoder of the base has this scorer's token embedding, as copies and casts of it have."""
    found = [tensor for name, tensor in model.state_dict().items() if name.endswith(EMBEDDING)]
    for part in ("text_encoder", "text_encoder_2"):
        for file in base.weights[part]:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    if not name.endswith(EMBEDDING):
                        continue
                    for ours in found:
                        if list(opened.get_slice(name).get_shape()) == list(ours.shape):
                            theirs = opened.get_tensor(name).float()
                            if torch.allclose(theirs, ours.float().cpu(), rtol=1e-2, atol=1e-4):
                                return True
    return False


def _sized(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"

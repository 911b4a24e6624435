"""Finds a base model's folder and checks that its files are whole. Imports no torch: answers in milliseconds.

A base is a folder in diffusers' layout, from disk or from the Hugging Face hub's cache. Weights are read from
safetensors only: pickles can run code.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lorafleet.core.errors import BaseNotFound, BaseUnreadable, ConfigError
from lorafleet.models import EMOJIXL
from lorafleet.sdxl.config import BaseConfig

WEIGHT_STEMS: Final[Mapping[str, str]] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Folder of each model with the name its weight files start with."""
CONFIG_FILES: Final = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "scheduler": "scheduler_config.json",
}
TOKENIZERS: Final = ("tokenizer", "tokenizer_2")
TOKENIZER_FILES: Final = ("vocab.json", "merges.txt", "tokenizer.json")
MAX_HEADER_BYTES: Final = 100 * 1024 * 1024  # the limit of the safetensors format itself
_HUB_ID: Final = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class BaseFolder:
    """A checked base: `parts` maps each part (`unet`, `vae`, ...) to its folder, `weights` to its weight files."""

    root: Path
    parts: Mapping[str, Path]
    weights: Mapping[str, tuple[Path, ...]]


def find_base(config: BaseConfig) -> BaseFolder:
    """The checked folder of a base, downloaded first when `config.id` is a hub id.

    Raises BaseNotFound, BaseUnreadable or ConfigError, each one sentence naming what is missing.
    """
    root = EMOJIXL if config.id == "emojixl" else _locate(config.id, config.revision, config.variant, "base.id")
    if not root.is_dir():
        raise BaseNotFound(f"the embedded base is missing: no folder {root}", param="base.id")
    parts = {name: root / name for name in (*CONFIG_FILES, *TOKENIZERS)}
    if config.vae is not None:
        parts["vae"] = _locate(config.vae, config.vae_revision, None, "base.vae")
    _check_kind(root)
    for name, file_name in CONFIG_FILES.items():
        read_json(parts[name] / file_name)
    if read_json(parts["unet"] / "config.json").get("addition_embed_type") != "text_time":
        raise BaseUnreadable(f"{parts['unet']} is not the UNet of an SDXL base (addition_embed_type is not text_time)")
    for name in TOKENIZERS:
        if not any((parts[name] / file).is_file() for file in ("vocab.json", "tokenizer.json")):
            raise BaseUnreadable(f"{parts[name]} has neither vocab.json nor tokenizer.json")
    weights = {
        name: _weight_files(parts[name], stem, None if name == "vae" and config.vae is not None else config.variant)
        for name, stem in WEIGHT_STEMS.items()
    }
    for files in weights.values():
        for file in files:
            read_header(file)
    return BaseFolder(root=root, parts=parts, weights=weights)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the base. Raises BaseUnreadable."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BaseUnreadable(f"{path} is missing") from None
    except OSError as error:
        raise BaseUnreadable(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BaseUnreadable(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BaseUnreadable(f"{path} does not hold a JSON object")
    return content


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Offset of the data in bytes and the tensors' entries of a safetensors file.

    Raises BaseUnreadable when the header is no such thing or the file is shorter or longer than it says.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header_bytes = struct.unpack("<Q", file.read(8))[0]
            if header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            entries = json.loads(file.read(header_bytes))
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise BaseUnreadable(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BaseUnreadable(f"{path} is not a safetensors file: {error}") from error
    if size != 8 + header_bytes + end:
        raise BaseUnreadable(f"{path} is damaged: {size} bytes, its header says {8 + header_bytes + end}")
    return 8 + header_bytes, entries


def _check_kind(root: Path) -> None:
    if not (root / "model_index.json").is_file():
        raise BaseUnreadable(f"{root} is no base model: model_index.json is missing", param="base.id")
    kind = read_json(root / "model_index.json").get("_class_name")
    if kind != "StableDiffusionXLPipeline":
        raise BaseUnreadable(f"{root} holds a {kind}, not an SDXL base (StableDiffusionXLPipeline)", param="base.id")


def _weight_files(folder: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    """One file, or the shards that an index names."""
    suffix = f".{variant}" if variant else ""
    single = folder / f"{stem}{suffix}.safetensors"
    if single.is_file():
        return (single,)
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    if not index.is_file():
        raise BaseUnreadable(f"{single} is missing")
    shards = {folder / name for name in read_json(index).get("weight_map", {}).values()}
    for shard in sorted(shards):
        if not shard.is_file():
            raise BaseUnreadable(f"{shard} is missing")
    return tuple(sorted(shards))


def _locate(id_or_path: str, revision: str | None, variant: str | None, setting: str) -> Path:
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"{setting} is the folder {path}: leave its revision out", param=setting)
        return path.resolve()
    if path.is_file():
        raise BaseNotFound(f"{setting} {path} is a file: give a folder in diffusers' layout", param=setting)
    if not _HUB_ID.match(id_or_path) or id_or_path.startswith("."):
        raise BaseNotFound(f"no base model folder {path}", param=setting)
    return _download(id_or_path, revision, variant, setting)


def _download(hub_id: str, revision: str | None, variant: str | None, setting: str) -> Path:
    """The hub's snapshot of just the files that `find_base` reads, from the cache when offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    suffix = f".{variant}" if variant else ""
    patterns = ["model_index.json"] + [f"{name}/{file}" for name, file in CONFIG_FILES.items()]
    patterns += [f"{name}/*" for name in TOKENIZERS]
    for name, stem in WEIGHT_STEMS.items():
        shapes = (f"{stem}{suffix}.safetensors", f"{stem}{suffix}-*-of-*.safetensors")
        patterns += [f"{name}/{shape}" for shape in (*shapes, f"{stem}.safetensors.index{suffix}.json")]
    if setting == "base.vae":
        patterns = ["config.json", "diffusion_pytorch_model.safetensors"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        wanted = hub_id if revision is None else f"{hub_id} at revision {revision}"
        raise BaseNotFound(
            f"there is no folder {hub_id}, and {wanted} could not be had from the model hub "
            f"({type(error).__name__}): give a folder, or check the id and the network",
            param=setting,
        ) from error

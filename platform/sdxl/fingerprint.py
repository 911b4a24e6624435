"""One hash for "the same base model": sha256 over its weights and the configuration that shapes its output.

Two folders have the same fingerprint when every tensor has the same name, stored type, shape and bytes and the
configurations agree, however the files are named or sharded. The weights are hashed as stored, so the fingerprint
does not depend on the type they are loaded in; an fp16 copy of an fp32 base is another base.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from lorafleet.sdxl.folder import CONFIG_FILES, TOKENIZER_FILES, TOKENIZERS, BaseFolder, read_header, read_json

CHUNK_BYTES: Final = 16 * 1024 * 1024
# Who wrote a config and in which type it was loaded does not change a pixel.
_IGNORED_KEYS: Final = frozenset({"transformers_version", "torch_dtype", "dtype", "architectures"})


def fingerprint(folder: BaseFolder) -> str:
    """64 hex digits. Reads every weight file once: about 1 s per GB and core. Raises BaseUnreadable."""
    with ThreadPoolExecutor(max_workers=len(folder.weights)) as pool:  # hashlib lets go of the GIL
        digests = pool.map(_hash_tensors, folder.weights.values())
        parts: dict[str, Any] = dict(zip(folder.weights, digests, strict=True))
    for name, file_name in CONFIG_FILES.items():
        parts[f"{name}/config"] = _relevant(read_json(folder.parts[name] / file_name))
    for name in TOKENIZERS:
        files = [folder.parts[name] / file for file in TOKENIZER_FILES]
        # vocab.json + merges.txt say everything; tokenizer.json repeats them, so it counts only where they are not.
        present = [file for file in files if file.is_file()][:2]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in present]
        parts[name] = [*hashes, *_padding(folder.parts[name] / "tokenizer_config.json")]
    index = read_json(folder.root / "model_index.json")
    parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash_tensors(files: tuple[Path, ...]) -> str:
    """Digest of all tensors of one part in the order of their names."""
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        start, entries = read_header(path)
        tensors.update({name: (path, start, entry) for name, entry in entries.items()})
    digest = hashlib.sha256()
    for name in sorted(tensors):
        path, start, entry = tensors[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        begin, end = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(start + begin)
            left = end - begin
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def _padding(path: Path) -> list[Any]:
    """What a tokenizer fills the window with, and how long the window is."""
    config = read_json(path) if path.is_file() else {}
    token = config.get("pad_token")
    return [token.get("content") if isinstance(token, dict) else token, config.get("model_max_length")]


def _relevant(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in _IGNORED_KEYS}

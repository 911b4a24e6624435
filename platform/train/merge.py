"""Merges adapters of one base into one, by PEFT's own arithmetic, a module at a time so that memory stays small."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from peft import LoraConfig, LoraModel

from lorafleet.core.errors import AdapterIncompatible, InvalidRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.registry import open_registry
from lorafleet.sdxl.adapter_file import base_targets, check_against
from lorafleet.sdxl.lora import Adapter, LowRank
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.train.config import TrainConfig
from lorafleet.train.randomness import key_bits

Method = Literal["linear", "svd", "ties", "dare"]
"""`linear`: A and B are averaged by themselves, which is cheap and only near the sum of the changes. The others work on
the changes B A themselves and find the nearest of the rank: `svd` their weighted sum, `ties` (https://arxiv.org/abs/2306.01708)
and `dare` (https://arxiv.org/abs/2311.03099) after leaving out small or random weights."""
METHODS: Final[tuple[str, ...]] = get_args(Method)
_PEFT_NAMES: Final = {"linear": "linear", "svd": "svd", "ties": "ties_svd", "dare": "dare_linear_svd"}


def merge_in_registry(
    config: TrainConfig,
    sources: Sequence[tuple[str, float]],
    name: str,
    *,
    method: Method = "svd",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Manifest:
    """Pushes the merger of the registry's adapters as the newest version of `name`.

    Raises AdapterNotFound, AdapterIncompatible and InvalidRequest.
    """
    registry = open_registry(config.registry)
    targets = base_targets(config.base)
    read = []
    for reference, weight in sources:
        file = registry.pull(registry.resolve(reference).manifest)
        read.append((read_adapter(file, targets), weight))
    merged = merge(read, name=name, method=method, rank=rank, density=density, seed=seed)
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
        file = Path(folder) / "adapter.safetensors"
        write_adapter(merged, file)
        return registry.push(name, file, check_against(targets))


def merge(
    sources: Sequence[tuple[Adapter, float]],
    *,
    name: str = "",
    method: Method = "svd",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Adapter:
    """The weighted merger; its alphas equal its ranks. `rank`: of the result, the largest of the sources' if left out.
    `density`: share of the weights that TIES and DARE keep, below 1; `seed`: of DARE's choice.

    Raises InvalidRequest, and AdapterIncompatible where `linear` meets different ranks or the bases differ.
    """
    if len(sources) < 2 or all(weight == 0 for _, weight in sources):
        raise InvalidRequest("give two adapters or more to merge, not all of weight 0.", param="sources")
    if method == "linear" and rank is not None:
        raise InvalidRequest("linear keeps the sources' rank: leave --rank out, or use svd.", param="rank")
    bases = {adapter.base_fingerprint for adapter, _ in sources} - {None}
    if len(bases) > 1:
        raise AdapterIncompatible("the adapters were trained on different bases: only those of one base can be merged")
    names = sorted({path for adapter, _ in sources for path in adapter.modules})
    modules: dict[str, LowRank] = {}
    for path in names:
        parts = [(adapter.modules[path], weight) for adapter, weight in sources if path in adapter.modules]
        wanted = rank or max(part.rank for part, _ in parts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_bits(seed, "merge", path))
            modules[path] = _merge_module(path, parts, method, wanted, density)
    words = tuple(dict.fromkeys(word for adapter, _ in sources for word in adapter.trigger_words))
    return Adapter(modules, name=name, trigger_words=words, base_fingerprint=next(iter(bases), None))


def _merge_module(
    path: str, parts: Sequence[tuple[LowRank, float]], method: Method, rank: int, density: float
) -> LowRank:
    if method == "linear" and len({part.rank for part, _ in parts}) > 1:
        ranks = ", ".join(str(part.rank) for part, _ in parts)
        raise AdapterIncompatible(f"linear needs equal ranks, {path} has {ranks}: use --method svd")
    first = parts[0][0]
    skeleton = torch.nn.Sequential(torch.nn.Linear(first.a.shape[1], first.b.shape[0], bias=False))
    rank = min(rank, first.a.shape[1], first.b.shape[0])
    model: Any = None
    for i, (part, _) in enumerate(parts):
        config = LoraConfig(r=part.rank, lora_alpha=part.alpha, target_modules=["0"])  # type: ignore[arg-type]
        if model is None:
            model = LoraModel(skeleton, config, f"source{i}")
        else:
            model.peft_config[f"source{i}"] = config
            model.inject_adapter(skeleton, f"source{i}")
        layer: Any = skeleton[0]
        layer.lora_A[f"source{i}"].weight.data = part.a.float()
        layer.lora_B[f"source{i}"].weight.data = part.b.float()
    if len(parts) == 1:  # nothing to merge with: its own change, weighted
        part, weight = parts[0]
        return LowRank(part.a.float(), part.b.float() * (weight * part.scale), float(part.rank))
    model.add_weighted_adapter(
        adapters=[f"source{i}" for i in range(len(parts))],
        weights=[weight for _, weight in parts],
        adapter_name="merged",
        combination_type=_PEFT_NAMES[method],
        svd_rank=None if method == "linear" else rank,
        svd_full_matrices=False,
        density=None if method in ("linear", "svd") else density,
    )
    merged: Any = skeleton[0]
    a, b = merged.lora_A["merged"].weight.data.contiguous(), merged.lora_B["merged"].weight.data.contiguous()
    return LowRank(a, b, float(a.shape[0]))

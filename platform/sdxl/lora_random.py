"""Adapters of random numbers, for tests and benches: as large as trained ones, and strong enough to be seen."""

import re
from collections.abc import Sequence

import torch

from lorafleet.sdxl.lora import Adapter, LowRank
from lorafleet.sdxl.lora_targets import Targets


def random_adapter(
    targets: Targets,
    seed: int,
    *,
    ranks: Sequence[int] = (8,),
    alphas: Sequence[float] = (8.0,),
    modules: str = r"unet\..+\.attn[12]\..+|text_encoder(_2)?\..+\.self_attn\..+",
    dtype: torch.dtype = torch.float32,
    strength: float = 0.3,
) -> Adapter:
    """An adapter over the linears that the regular expression `modules` matches, ranks and alphas taken in turn.

    At weight 1 each of its modules adds about `strength` times what a linear of a fresh model puts out.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in targets.linears if re.fullmatch(modules, name)]
    made: dict[str, LowRank] = {}
    for i, name in enumerate(names):
        out_features, in_features = targets.linears[name]
        rank, alpha = ranks[i % len(ranks)], float(alphas[i % len(alphas)])
        a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        b = torch.randn(out_features, rank, generator=generator) * strength * rank**0.5 / max(abs(alpha), 1.0)
        made[name] = LowRank(a.to(dtype), b.to(dtype), alpha)
    return Adapter(made, name=f"random-{seed}", base_fingerprint=targets.fingerprint)

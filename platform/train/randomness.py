"""Random numbers by key: what a sample draws depends on (seed, step, its number in the step) and on nothing else.

No generator has a state that would have to be saved, and none knows how many workers there are.
"""

import hashlib
import json
from typing import Final

import torch

_GOLDEN: Final = 0x9E3779B1 - (1 << 32)
# https://github.com/skeeto/hash-prospector, "two round functions": lowbias32 with exact bias 0.107
_ROUNDS: Final = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1))


def key_bits(seed: int, purpose: str, *numbers: int | str) -> int:
    """63 bits that differ whenever any part of the key does."""
    digest = hashlib.blake2b(json.dumps([seed, purpose, *numbers]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed(seed: int, purpose: str, *numbers: int | str) -> torch.Generator:
    """A CPU generator of its own for each key."""
    return torch.Generator().manual_seed(key_bits(seed, purpose, *numbers))


def key_int32(seed: int, purpose: str, *numbers: int | str) -> int:
    """As `key_bits`, what fits into an int32 tensor."""
    return (key_bits(seed, purpose, *numbers) & 0xFFFFFFFF) - (1 << 31)


class KeyedDropout(torch.nn.Module):
    """Dropout whose mask is a hash of (sample's key, module's key, element), in place of `torch.nn.Dropout`.

    A sample's mask so does not depend on its neighbours, on the device, or on how often a checkpointed forward is run
    again. `keys`: int32 [B] on the input's device, one for each row of the batch, set before each forward; the tensor
    is shared by all modules of an adapter.
    """

    module_key: torch.Tensor

    def __init__(self, p: float, module_key: int, keys: "SampleKeys") -> None:
        super().__init__()
        self.p = p
        # A tensor: a number would be a constant of the compiled block, and every block would be compiled anew.
        self.register_buffer("module_key", torch.tensor(module_key, dtype=torch.int32), persistent=False)
        self.keys = keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, ..., C], any float type."""
        if not self.training:
            return x
        rows = self.keys.rows
        assert rows is not None, "the samples' keys are set before each training forward"
        bits = hash_bits(rows ^ self.module_key, x[0].numel())
        kept = (bits & 0xFFFFFF) >= int(self.p * (1 << 24))
        return x * kept.view(x.shape) / (1 - self.p)


class SampleKeys:
    """Where the dropouts of one adapter find the keys of the batch's rows."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None


def hash_bits(keys: torch.Tensor, count: int) -> torch.Tensor:
    """keys: int32 [B] -> int32 [B, count], bits that look independent for each key and place."""
    # No product with the places themselves: Inductor would fold it into its index arithmetic, where with a tensor's
    # strides it leaves int32, and Triton refuses it.
    places = _mix(torch.arange(count, dtype=torch.int32, device=keys.device) ^ _GOLDEN)
    return _mix(places[None, :] ^ keys[:, None])


def _mix(h: torch.Tensor) -> torch.Tensor:
    for shift, factor in _ROUNDS:
        h = h ^ ((h >> shift) & ((1 << (32 - shift)) - 1))  # int32 has no logical shift
        h = h * factor
    return h

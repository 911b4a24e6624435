"""The adapter slots on the device: one tensor that every wrapped linear sees its part of.

Slot s is `storage[s]`, [R, W]: line i holds rank i of every module, A's row and B's column side by side. So a fill is
one contiguous copy, and an adapter of rank r takes only the first r lines, in memory and on the way. Slot 0 is zeros:
a row without an adapter runs the same kernels and adds exact zeros. Shapes never change.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_targets import Targets
from lorafleet.serve.engine.adapter_pack import Place

logger = logging.getLogger(__name__)

_here = threading.local()


@contextmanager
def without_adapters() -> Iterator[None]:
    """What this thread runs or records meanwhile on a GPU leaves the adapters' kernels out: for batches that have none.
    What is compiled is the same."""
    before, _here.leaves_out = leaves_out(), True
    try:
        yield
    finally:
        _here.leaves_out = before


def leaves_out() -> bool:
    """Whether this thread is within `without_adapters`."""
    return getattr(_here, "leaves_out", False)


class RowInputs:
    """Which slots each row of a batch uses, and how strongly: the static inputs of all wrapped linears of a model.

    `slots`: [rows, K], int64, 0 where there is none. `weights`: [rows, K], float32. `ranks`: [rows, K], int32, how
    many lines of the slot there are to read, 0 also where the weight is. Written in place only; one thread, the one
    that runs the model.
    """

    def __init__(self, rows: int, per_row: int, device: torch.device) -> None:
        self.slots = torch.zeros(rows, per_row, dtype=torch.int64, device=device)
        self.weights = torch.zeros(rows, per_row, dtype=torch.float32, device=device)
        self.ranks = torch.zeros(rows, per_row, dtype=torch.int32, device=device)
        self.used: list[tuple[int, int, float, int]] = []  # (row, slot, weight, rank) of what is not zero
        self._last: list[tuple[int, int, int, float, int]] = []

    def write(self, rows: Sequence[Sequence[tuple[int, float]]], ranks: Sequence[int]) -> None:
        """Sets the first rows and clears the others. `ranks`: how many lines of each slot are not zeros."""
        wanted = [
            (i, k, slot, weight, ranks[slot] if weight != 0.0 else 0)
            for i, row in enumerate(rows)
            for k, (slot, weight) in enumerate(row)
        ]
        if wanted == self._last:
            return
        self.used = [(i, slot, weight, rank) for i, _, slot, weight, rank in wanted if rank]
        values = [torch.zeros(inputs.shape, dtype=inputs.dtype) for inputs in (self.slots, self.weights, self.ranks)]
        for i, k, *value in wanted:
            for tensor, number in zip(values, value, strict=True):
                tensor[i, k] = number
        for inputs, tensor in zip((self.slots, self.weights, self.ranks), values, strict=True):
            # On a GPU without waiting for the steps that are under way, which still read what was set for them.
            inputs.copy_(tensor.pin_memory() if inputs.is_cuda else tensor, non_blocking=True)
        self._last = wanted


class SlotLinear(nn.Linear):
    """A linear that adds to row i of its input what the adapters of row i say.

    It shares weight and bias with the linear it stands for, so that names, state dicts and `isinstance` stay true.
    x: [rows, tokens, in] or [rows, in], rows up to those of the `RowInputs`. In float32 and eagerly, rows without an
    adapter equal the plain linear's bit for bit.

    It may stand for several linears of one input, its parts: queries, keys and values of a self attention.

    Three ways to the same numbers. `_row_by_row` does only what there is to do, which a CPU wants. `_batched` does the
    same few kernels whatever the rows hold, which a compiler needs. On a GPU the kernels of `slot_kernels` do both.
    One core, emojixl's UNet, 8 rows: 65 ms without adapters; with one of rank 8 in each row 74 ms in place of 159 (bank
    of rank 64, 4 a row), with four 111 and 150.
    """

    def __init__(
        self, linear: nn.Linear, storage: torch.Tensor, place: Place, inputs: RowInputs, parts: int = 1, apart: int = 0
    ) -> None:
        """`storage`: [S, R, width], the tensor of all slots; only views of it are kept. With `parts` the linear stands
        for so many of one input, `place` is that of the first, and each next one's is `apart` elements further."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.register_module("product", None)
        self._inputs = inputs
        self.goes_row_by_row = storage.device.type == "cpu"
        self._add = _gpu_kernel() if storage.is_cuda else None
        slots, lines, width = storage.shape

        def view(at: int, features: int) -> torch.Tensor:
            return storage.as_strided((slots, lines, parts, features), (lines * width, width, apart, 1), at)

        # buffers, because compilers and CUDA graphs take those for addresses that stay
        self.register_buffer("slot_a", view(place.a, place.in_features), persistent=False)
        self.register_buffer("slot_b", view(place.b, place.out_features), persistent=False)
        self.register_buffer("row_slots", inputs.slots, persistent=False)
        self.register_buffer("row_weights", inputs.weights, persistent=False)
        self.register_buffer("row_ranks", inputs.ranks, persistent=False)

    product: "Product | None"
    """Used in place of the linear's own product, where there is one (see `fp8`)."""
    slot_a: torch.Tensor  # [S, R, P, in]
    slot_b: torch.Tensor  # [S, R, P, out of a part], B transposed: then rank is the inner dimension of neither gather
    row_slots: torch.Tensor
    row_weights: torch.Tensor
    row_ranks: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is None:
            y = functional.linear(x, self.weight, self.bias)  # contiguous and nobody else's
        elif self.product.adds_adapters:
            return self.product.with_adapters(x, self.bias, self.adapters())
        else:
            x = self.product.quantised(x)
            y = self.product(x, self.bias)
            x = self.product.dequantised(x)
        if self.goes_row_by_row and not torch.compiler.is_compiling():
            return self._row_by_row(x, y)
        if self._add is not None:
            self._add(_with_tokens(y), _with_tokens(x), *self.adapters())
            return y
        return self._batched(x, y)

    def adapters(self) -> tuple[torch.Tensor, ...]:
        """What the kernels of `slot_kernels` take."""
        return self.slot_a, self.slot_b, self.row_slots, self.row_weights, self.row_ranks

    def _row_by_row(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Changes and returns `y`. A row's numbers do not depend on its neighbours."""
        if len(x) > len(self.row_slots):
            raise RuntimeError(f"{len(x)} rows, the slots were made for {len(self.row_slots)}")
        for row, slot, weight, rank in self._inputs.used:
            if row < len(x):
                tokens, added_to = x[row].reshape(-1, self.in_features), y[row].view(-1, self.out_features)
                parts, features = self.slot_b.shape[2:]
                for part in range(parts):
                    h = torch.mm(tokens, self.slot_a[slot, :rank, part].T)
                    columns = added_to.narrow(1, part * features, features)
                    columns.addmm_(h, self.slot_b[slot, :rank, part], alpha=weight)
        return y

    def _batched(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows, rank = x.shape[0], self.slot_a.shape[1]
        lines = self.row_slots.shape[1] * rank  # K * R
        slots = self.row_slots[:rows].flatten()
        tokens = _with_tokens(x)
        parts = y.view(rows, -1, self.out_features).chunk(self.slot_b.shape[2], dim=2)
        sums = []
        for part, y_part in enumerate(parts):
            a = self.slot_a[:, :, part].index_select(0, slots).view(rows, lines, -1)
            b = self.slot_b[:, :, part].index_select(0, slots).view(rows, lines, -1)
            h = torch.bmm(tokens, a.transpose(1, 2)).view(rows, tokens.shape[1], -1, rank)  # [rows, tokens, K, R]
            h = h * self.row_weights[:rows, None, :, None]  # a float32 product: a weight of 0.7 is no bfloat16
            sums.append(torch.baddbmm(y_part, h.to(y.dtype).view(rows, -1, lines), b))
        return torch.cat(sums, dim=2).view_as(y) if len(sums) > 1 else sums[0].view_as(y)


class Product(Protocol):
    """What a linear computes, in another way; see `fp8.Fp8Product`."""

    adds_adapters: bool
    """Whether `with_adapters` is there, on this device."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As the linear; `x` may be quantised."""

    def with_adapters(
        self, x: torch.Tensor, bias: torch.Tensor | None, adapters: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """As the linear, and what the `adapters` of `SlotLinear.adapters` add to it, in one."""

    def quantised(self, x: torch.Tensor) -> torch.Tensor:
        """As `__call__` takes it in the end; what is already so stays as it is."""

    def dequantised(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers that a quantised `x` stands for: what adapters see."""


def _with_tokens(x: torch.Tensor) -> torch.Tensor:
    """[rows, features] as [rows, 1, features]"""
    return x if x.dim() == 3 else x.unsqueeze(1)


@functools.cache
def _gpu_kernel() -> Callable[..., None] | None:
    """None where Triton is not installed; CUDA builds of PyTorch bring it on Linux."""
    try:
        from lorafleet.serve.engine.slot_kernels import add_low_rank
    except ImportError as error:
        logger.warning("adapters take slower ways on this GPU: %s", error)
        return None
    return add_low_rank


def wrap(
    base: Base, targets: Targets, places: Mapping[str, Place], storage: torch.Tensor, inputs: Mapping[str, RowInputs]
) -> dict[str, nn.Linear]:
    """Puts a SlotLinear in place of each linear in `places`; the ones that were there, by name. `inputs` by part."""
    originals: dict[str, nn.Linear] = {}
    for name, place in places.items():
        part, path = targets.paths[name]
        linear = getattr(base.pipeline, part).get_submodule(path)
        assert type(linear) is not SlotLinear
        originals[name] = linear
        _put(base, part, path, SlotLinear(linear, storage, place, inputs[part]))
    return originals


def unwrap(base: Base, targets: Targets, originals: Mapping[str, nn.Linear]) -> None:
    """Undoes `wrap`."""
    for name, linear in originals.items():
        _put(base, *targets.paths[name], linear)


def _put(base: Base, part: str, path: str, linear: nn.Linear) -> None:
    parent, _, last = path.rpartition(".")
    setattr(getattr(base.pipeline, part).get_submodule(parent), last, linear)

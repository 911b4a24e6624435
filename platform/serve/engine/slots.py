"""The adapter slots on the device: one tensor that every wrapped linear sees its part of.

Slot s is `storage[s]`, [R, W]: line i holds rank i of every module, A's row and B's column side by side. So a fill is
one contiguous copy, and an adapter of rank r takes only the first r lines, in memory and on the way. Slot 0 is zeros:
a row without an adapter runs the same kernels and adds exact zeros. Shapes never change.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_targets import Targets
from lorafleet.serve.engine.adapter_pack import Place

logger = logging.getLogger(__name__)


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

    Three ways to the same numbers. `_row_by_row` does only what there is to do, which a CPU wants. `_batched` does the
    same few kernels whatever the rows hold, which a compiler needs. On a GPU the kernels of `slot_kernels` do both.
    One core, emojixl's UNet, 8 rows: 65 ms without adapters; with one of rank 8 in each row 74 ms in place of 159 (bank
    of rank 64, 4 a row), with four 111 and 150.
    """

    def __init__(self, linear: nn.Linear, storage: torch.Tensor, place: Place, inputs: RowInputs) -> None:
        """`storage`: [S, R, width], the tensor of all slots; only views of it are kept."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.register_module("product", None)
        self._inputs = inputs
        self.goes_row_by_row = storage.device.type == "cpu"
        self._add = _gpu_kernel() if storage.is_cuda else None
        # buffers, because compilers and CUDA graphs take those for addresses that stay
        self.register_buffer("slot_a", storage[:, :, place.a : place.a + place.in_features], persistent=False)
        self.register_buffer("slot_b", storage[:, :, place.b : place.b + place.out_features], persistent=False)
        self.register_buffer("row_slots", inputs.slots, persistent=False)
        self.register_buffer("row_weights", inputs.weights, persistent=False)
        self.register_buffer("row_ranks", inputs.ranks, persistent=False)

    product: nn.Module | None
    """Called with x and bias in place of the linear's own product, where there is one (see `fp8`). What adapters add
    comes from the same x and is none of its business."""
    slot_a: torch.Tensor  # [S, R, in]
    slot_b: torch.Tensor  # [S, R, out], B transposed: then rank is the inner dimension of neither gather
    row_slots: torch.Tensor
    row_weights: torch.Tensor
    row_ranks: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.goes_row_by_row and not torch.compiler.is_compiling():
            return self._row_by_row(x, y)
        if self._add is not None:
            slots = self.slot_a, self.slot_b, self.row_slots, self.row_weights, self.row_ranks
            self._add(_with_tokens(y), _with_tokens(x), *slots)
            return y
        return self._batched(x, y)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """What there is without adapters, contiguous and nobody else's."""
        if self.product is None:
            return functional.linear(x, self.weight, self.bias)
        y: torch.Tensor = self.product(x, self.bias)
        return y

    def _row_by_row(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Changes and returns `y`. A row's numbers do not depend on its neighbours."""
        if len(x) > len(self.row_slots):
            raise RuntimeError(f"{len(x)} rows, the slots were made for {len(self.row_slots)}")
        for row, slot, weight, rank in self._inputs.used:
            if row < len(x):
                h = torch.mm(x[row].reshape(-1, self.in_features), self.slot_a[slot, :rank].T)
                y[row].view(-1, self.out_features).addmm_(h, self.slot_b[slot, :rank], alpha=weight)
        return y

    def _batched(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows, rank = x.shape[0], self.slot_a.shape[1]
        lines = self.row_slots.shape[1] * rank  # K * R
        slots = self.row_slots[:rows].flatten()
        a = self.slot_a.index_select(0, slots).view(rows, lines, self.in_features)
        b = self.slot_b.index_select(0, slots).view(rows, lines, self.out_features)
        tokens = _with_tokens(x)
        h = torch.bmm(tokens, a.transpose(1, 2)).view(rows, tokens.shape[1], -1, rank)  # [rows, tokens, K, R]
        h = h * self.row_weights[:rows, None, :, None]  # a float32 product: a weight of 0.7 is no bfloat16
        h = h.to(y.dtype).view(rows, -1, lines)
        return torch.baddbmm(y.view(rows, -1, self.out_features), h, b).view_as(y)


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

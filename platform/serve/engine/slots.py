"""The adapter slots on the device: one tensor that every wrapped linear sees its part of.

Slot s is `storage[s]`, [R, W]: line i holds rank i of every module, A's row and B's column side by side. So a fill is
one contiguous copy, and an adapter of rank r takes only the first r lines, in memory and on the way. Slot 0 is zeros:
a row without an adapter runs the same kernels and adds exact zeros. Shapes never change.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_targets import Targets
from lorafleet.serve.engine.adapter_pack import Place


class RowInputs:
    """Which slots each row of a batch uses, and how strongly: the static inputs of all wrapped linears of a model.

    `slots`: [rows, K], int64, 0 where there is none. `weights`: [rows, K], float32. Written in place only; one
    thread, the one that runs the model.
    """

    def __init__(self, rows: int, per_row: int, device: torch.device) -> None:
        self.slots = torch.zeros(rows, per_row, dtype=torch.int64, device=device)
        self.weights = torch.zeros(rows, per_row, dtype=torch.float32, device=device)
        self.used: list[tuple[int, int, float, int]] = []  # (row, slot, weight, rank) of what is not zero
        self._last: list[list[tuple[int, float]]] = []

    def write(self, rows: Sequence[Sequence[tuple[int, float]]], ranks: Sequence[int]) -> None:
        """Sets the first rows and clears the others. `ranks`: how many lines of each slot are not zeros."""
        wanted = [list(row) for row in rows]
        self.used = [
            (i, slot, weight, ranks[slot])
            for i, row in enumerate(wanted)
            for slot, weight in row
            if slot != 0 and weight != 0.0
        ]
        if wanted == self._last:
            return
        slots, weights = torch.zeros(self.slots.shape, dtype=torch.int64), torch.zeros(self.weights.shape)
        for i, row in enumerate(wanted):
            for k, (slot, weight) in enumerate(row):
                slots[i, k] = slot
                weights[i, k] = weight
        self.slots.copy_(slots)
        self.weights.copy_(weights)
        self._last = wanted


class SlotLinear(nn.Linear):
    """A linear that adds to row i of its input what the adapters of row i say.

    It shares weight and bias with the linear it stands for, so that names, state dicts and `isinstance` stay true.
    x: [rows, tokens, in] or [rows, in], rows up to those of the `RowInputs`. In float32 and eagerly, rows without an
    adapter equal the plain linear's bit for bit.

    Two ways to the same numbers. `_batched` does the same few kernels whatever the rows hold, which a graph needs.
    `_row_by_row` does only what there is to do, which a CPU wants. One core, emojixl's UNet, 8 rows: 65 ms without
    adapters; with one of rank 8 in each row 74 ms in place of 159 (bank of rank 64, 4 a row), with four 111 and 150.
    """

    def __init__(self, linear: nn.Linear, storage: torch.Tensor, place: Place, inputs: RowInputs) -> None:
        """`storage`: [S, R, width], the tensor of all slots; only views of it are kept."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self._inputs = inputs
        self.goes_row_by_row = storage.device.type == "cpu"
        # buffers, because compilers and CUDA graphs take those for addresses that stay
        self.register_buffer("slot_a", storage[:, :, place.a : place.a + place.in_features], persistent=False)
        self.register_buffer("slot_b", storage[:, :, place.b : place.b + place.out_features], persistent=False)
        self.register_buffer("row_slots", inputs.slots, persistent=False)
        self.register_buffer("row_weights", inputs.weights, persistent=False)

    slot_a: torch.Tensor  # [S, R, in]
    slot_b: torch.Tensor  # [S, R, out], B transposed: then rank is the inner dimension of neither gather
    row_slots: torch.Tensor
    row_weights: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if self.goes_row_by_row and not torch.compiler.is_compiling():
            return self._row_by_row(x, y)
        return self._batched(x, y)

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
        tokens = x if x.dim() == 3 else x.unsqueeze(1)
        h = torch.bmm(tokens, a.transpose(1, 2)).view(rows, tokens.shape[1], -1, rank)  # [rows, tokens, K, R]
        h = h * self.row_weights[:rows, None, :, None]  # a float32 product: a weight of 0.7 is no bfloat16
        h = h.to(y.dtype).view(rows, -1, lines)
        return torch.baddbmm(y.view(rows, -1, self.out_features), h, b).view_as(y)


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

"""Keys and values of the text, computed once for a job: its text and adapters do not change between steps.

SDXL's UNet has 70 cross attentions, so a step is spared 140 products, and as many places where adapters are added.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from lorafleet.sdxl.base import Base
from lorafleet.serve.engine.attention import attend, attend_to_text, has_text_kernel, is_plain
from lorafleet.serve.engine.bank import JOB_ROWS, AdapterBank
from lorafleet.serve.engine.recording import Recording
from lorafleet.serve.engine.slots import without_adapters

_serials = itertools.count()


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values of one job in every cross attention of the UNet.

    `rows`: [rows, L * N], layer after layer, keys [L, d] then values [L, d]; 26 MB a row with SDXL in bfloat16.
    `hidden`: [rows, L, 0], what the UNet gets in place of the text. `serial`: no other has it.
    """

    rows: torch.Tensor
    hidden: torch.Tensor
    serial: int


def is_possible(base: Base) -> bool:
    """Whether the UNet's cross attentions are as diffusers makes them, with weights that stay in place.

    Another attention backend computes them in its own way; another engine on the same base was there first.
    """
    attentions = _cross_attentions(base)
    return bool(attentions) and not base.config.low_memory and all(map(is_plain, attentions))


class CrossAttention:
    """Replaces what the UNet's cross attentions compute from the text, until `close`.

    Where the UNet is given a text, and not `KeyValues.hidden`, they compute as before.
    """

    def __init__(self, base: Base, rows: int, bank: AdapterBank | None = None) -> None:
        """For batches of up to `rows` rows. `bank`: made with `cross_apart`. `is_possible(base)` holds."""
        self._bank = bank
        self._attentions = _cross_attentions(base)
        self._originals = [attention.processor for attention in self._attentions]
        length = base.pipeline.tokenizer.model_max_length
        widths = [linear.out_features for linear in self._linears()]
        with torch.inference_mode(False):  # else it could only be written to in inference mode
            self._storage = torch.zeros(rows, length * sum(widths), dtype=base.dtype, device=base.device)
        parts = [
            part.view(rows, length, width)
            for part, width in zip(
                torch.split(self._storage, [length * width for width in widths], dim=1), widths, strict=True
            )
        ]
        for attention, keys, values in zip(self._attentions, parts[::2], parts[1::2], strict=True):
            attend_so = attend_to_text if has_text_kernel(attention, keys) else attend
            attention.set_processor(_Stored(keys, values, attention.processor, attend_so))
        self._recordings: dict[tuple[int, bool], Recording] = {}  # by rows and whether these have adapters
        self._stored: list[tuple[int, int] | None] = [None] * rows  # serial and row of what each row holds

    def compute(self, hidden: torch.Tensor, adapters: Sequence[tuple[int, float]] = ()) -> KeyValues:
        """For one job, `hidden` [rows, L, D], with (slot, weight) pairs in each of its rows; for one thread at a time,
        which may be another than the UNet's. The slots' leases are held until the device is done."""
        if self._bank is not None:
            self._bank.set_cross_rows([adapters] * len(hidden))
        recording = self._recordings.get((len(hidden), bool(adapters)))
        (rows,) = self._project(hidden) if recording is None else recording.replay(hidden)
        return KeyValues(rows, hidden.new_empty(*hidden.shape[:2], 0), next(_serials))

    def warm_up(self) -> None:
        """Records `compute` as CUDA graphs: its 140 products, each with two kernels of its adapters, would keep the CPU
        busy for many times what they take, and jobs that arrive together wait for each other's."""
        pool = torch.cuda.graph_pool_handle()
        features = self._linears()[0].in_features
        blank = self._storage.new_zeros(JOB_ROWS, len(self._attentions[0].processor.keys[0]), features)
        with torch.inference_mode():
            for rows in range(1, JOB_ROWS + 1):
                self._recordings[rows, True] = Recording(self._project, [blank[:rows].clone()], pool, goes_first=True)
                with without_adapters():
                    self._recordings[rows, False] = Recording(
                        self._project, [blank[:rows].clone()], pool, goes_first=True
                    )

    def set_rows(self, jobs: Sequence[KeyValues]) -> None:
        """What the first rows of the next UNet batch attend to, job after job; those behind keep what they had.
        Whatever is in its place already is not copied again."""
        row = 0
        for job in jobs:
            places = slice(row, row + len(job.rows))
            wanted = [(job.serial, i) for i in range(len(job.rows))]
            if self._stored[places] != wanted:
                self._storage[places].copy_(job.rows)
                self._stored[places] = wanted
            row = places.stop

    def close(self) -> None:
        """Puts the processors back that were there. May be called twice."""
        self._recordings.clear()
        for attention, processor in zip(self._attentions, self._originals, strict=True):
            attention.set_processor(processor)

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cat([linear(hidden).flatten(1) for linear in self._linears()], dim=1),)

    def _linears(self) -> list[nn.Linear]:
        return [linear for attention in self._attentions for linear in (attention.to_k, attention.to_v)]


class _Stored(nn.Module):
    """Attends to stored keys and values, as AttnProcessor2_0 does to those that it computes."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        original: Callable[..., torch.Tensor],
        attend_so: Callable[..., torch.Tensor] = attend,
    ) -> None:
        """`keys` and `values`: [most rows, L, d], of which views are kept."""
        super().__init__()
        self._original = original
        self._attend = attend_so
        # buffers, because compilers and CUDA graphs take those for addresses that stay
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("values", values, persistent=False)

    keys: torch.Tensor
    values: torch.Tensor

    def forward(
        self,
        attention: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is None or encoder_hidden_states.shape[-1] > 0:
            return self._original(attention, hidden_states, encoder_hidden_states, attention_mask)
        rows = hidden_states.shape[0]
        return self._attend(attention, attention.to_q(hidden_states), self.keys[:rows], self.values[:rows])


def _cross_attentions(base: Base) -> list[Attention]:
    modules = base.pipeline.unet.named_modules()
    return [module for name, module in modules if name.endswith(".attn2") and isinstance(module, Attention)]

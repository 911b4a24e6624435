"""Embeddings of the prompts seen last, so that a prompt used again is not encoded again."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.text import PromptEmbedding, RunEncoder, encode_negative, encode_prompt, run_encoder
from lorafleet.serve.engine.bank import AdapterBank, Lease

Weighted = Sequence[tuple[Lease, float]]


class PromptCache:
    """The `entries` texts used last and their embeddings, on the base's device; 0 keeps none.

    A text counts together with the adapters that change a text encoder, so that all others share its embedding. One
    of SDXL's takes 0.3 MB in bfloat16. Safe for several threads, one of which encodes at a time: the text encoders'
    rows in the bank are one for all.
    """

    def __init__(
        self, base: Base, entries: int, bank: AdapterBank | None = None, run: RunEncoder = run_encoder
    ) -> None:
        """`run`: of `lorafleet.sdxl.text.encode_prompt`."""
        self._base = base
        self._run = run
        self._entries = entries
        self._bank = bank
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, tuple[tuple[str, float], ...]], PromptEmbedding] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def pair(
        self, prompt: str, negative_prompt: str, adapters: Weighted = ()
    ) -> tuple[PromptEmbedding, PromptEmbedding]:
        """Both sides of guidance, as `lorafleet.sdxl.text` makes them, with the adapters in both. The leases are
        published, and held by the caller until this returns."""
        in_text = [(lease, weight) for lease, weight in adapters if lease.changes_text and weight != 0.0]
        positive = self._encode(prompt, in_text)
        if not negative_prompt and self._base.pipeline.config.force_zeros_for_empty_prompt:
            return positive, encode_negative(self._base, negative_prompt, positive)
        return positive, self._encode(negative_prompt, in_text)

    def _encode(self, text: str, adapters: Weighted) -> PromptEmbedding:
        key = text, tuple((lease.key, weight) for lease, weight in adapters)
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                self.hits += 1
                return known
            self.misses += 1
            if self._bank is not None:
                self._bank.set_text_rows([[(lease.slot, weight) for lease, weight in adapters]])
            fresh = encode_prompt(self._base, text, self._run)
            self._known[key] = fresh
            while len(self._known) > self._entries:
                self._known.popitem(last=False)
            return fresh

"""Embeddings of the prompts seen last, so that a prompt used again is not encoded again."""

import threading
from collections import OrderedDict

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.text import PromptEmbedding, encode_negative, encode_prompt


class PromptCache:
    """The `entries` texts used last and their embeddings, on the base's device; 0 keeps none.

    One of SDXL's takes 0.3 MB in bfloat16. Safe for several threads; two that miss the same text at once both
    encode it.
    """

    def __init__(self, base: Base, entries: int) -> None:
        self._base = base
        self._entries = entries
        self._lock = threading.Lock()
        self._known: OrderedDict[str, PromptEmbedding] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def pair(self, prompt: str, negative_prompt: str) -> tuple[PromptEmbedding, PromptEmbedding]:
        """Both sides of guidance, as `lorafleet.sdxl.text` makes them."""
        positive = self._encode(prompt)
        if not negative_prompt and self._base.pipeline.config.force_zeros_for_empty_prompt:
            return positive, encode_negative(self._base, negative_prompt, positive)
        return positive, self._encode(negative_prompt)

    def _encode(self, text: str) -> PromptEmbedding:
        with self._lock:
            known = self._known.get(text)
            if known is not None:
                self._known.move_to_end(text)
                self.hits += 1
                return known
            self.misses += 1
        fresh = encode_prompt(self._base, text)
        with self._lock:
            self._known[text] = fresh
            while len(self._known) > self._entries:
                self._known.popitem(last=False)
        return fresh

"""How a base counts the tokens of a prompt, and what it can draw, without loading its weights. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from lorafleet.core.errors import BaseUnreadable
from lorafleet.sdxl.folder import CONFIG_FILES, TOKENIZERS, BaseFolder, read_json
from lorafleet.sdxl.limits import BaseLimits


@dataclass(frozen=True)
class TokenCounter:
    """Both tokenizers of a base. Not safe for several threads."""

    limits: BaseLimits
    tokenizers: tuple[Any, Any]

    def count(self, prompt: str) -> tuple[int, int]:
        """Tokens by each tokenizer, start and end token included, as if the window had no end."""
        first, second = (len(tokenizer(prompt, verbose=False).input_ids) for tokenizer in self.tokenizers)
        return first, second


def read_counter(folder: BaseFolder) -> TokenCounter:
    """In a second, most of it for importing transformers. Raises BaseUnreadable."""
    from transformers import CLIPTokenizer

    configs = {name: read_json(folder.parts[name] / file) for name, file in CONFIG_FILES.items()}
    try:
        first, second = (CLIPTokenizer.from_pretrained(folder.parts[name]) for name in TOKENIZERS)
        encoders = (configs["text_encoder"], configs["text_encoder_2"])
        window = min(
            *(tokenizer.model_max_length for tokenizer in (first, second)),
            *(encoder["max_position_embeddings"] for encoder in encoders),
        )
        limits = BaseLimits.of_configs(configs["unet"], configs["vae"], window)
    except Exception as error:  # whatever a damaged folder makes transformers raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseUnreadable(f"the base in {folder.root} does not load: {reason[0]}", param="base.id") from error
    return TokenCounter(limits, (first, second))

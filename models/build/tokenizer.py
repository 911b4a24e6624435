"""A byte-level BPE in CLIPTokenizer's own format, learned from the captions; bytes make it accept any text."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from lorafleet.models.build import config
from lorafleet.models.build.captions import all_words, corpus
from lorafleet.models.build.data import Data

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def learn(data: Data) -> CLIPTokenizer:
    """Learn VOCAB entries: 256 bytes, 256 word-final bytes, merges, two markers (as CLIP orders them)."""
    frame = CLIPTokenizer(vocab={BEGIN: 0, END: 1}).backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    wanted = config.VOCAB - 2 * len(alphabet) - 2
    trainer = BpeTrainer(
        vocab_size=2 * config.VOCAB,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        min_frequency=2,
        show_progress=False,
    )
    learner.train_from_iterator(corpus(data), trainer)
    merges = _merges(learner)[:wanted]
    tokens = alphabet + [b + WORD_END for b in alphabet] + [a + b for a, b in merges] + [BEGIN, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    if len(vocab) != config.VOCAB:
        raise ValueError(f"the captions gave {len(vocab)} tokens, config.VOCAB wants {config.VOCAB}")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=config.CONTEXT)


def save(tokenizer: CLIPTokenizer, folder: Path, pad_token: str = END) -> None:
    """Write `tokenizer` with another pad token (SDXL's second tokenizer pads with "!")."""
    vocab, merges = tokenizer.get_vocab(), _merges(tokenizer.backend_tokenizer)
    CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=config.CONTEXT).save_pretrained(
        folder
    )
    # The two files that readers other than transformers 5 look for.
    by_id = dict(sorted(vocab.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(by_id, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def word_ids(tokenizer: CLIPTokenizer, data: Data) -> dict[str, list[int]]:
    """Token ids of every word that a caption can hold."""
    words = sorted(all_words(data))
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    return dict(zip(words, ids, strict=True))


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]

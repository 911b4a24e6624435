"""From the cache to a portion's tensors: everything that chance decides about a sample is drawn here."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Self, TypeVar

import torch

from lorafleet.train.config import ObjectiveConfig
from lorafleet.train.data import EncodedSet
from lorafleet.train.objective import offset_noise
from lorafleet.train.randomness import key_int32, keyed
from lorafleet.train.sampler import Portion, Sample

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """A portion of B samples. Float32 but for the keys (int32) and `timesteps`, `ids_1`, `ids_2` (int64).

    `latents`, `noise`: [B, 4, h, w]. `prompt`: [B, L, D], `pooled`: [B, P], the cached embeddings; `ids_1`, `ids_2`:
    [B, L], the tokens, for text encoders in training. `has_text`: [B], 1, or 0 where the caption was dropped.
    `time_ids`: [B, 6]. `dropout_keys`: [B].
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompt: torch.Tensor
    pooled: torch.Tensor
    ids_1: torch.Tensor
    ids_2: torch.Tensor
    has_text: torch.Tensor
    time_ids: torch.Tensor
    dropout_keys: torch.Tensor

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """In memory that a GPU copies from while this process goes on."""
        return self._each(torch.Tensor.pin_memory)

    def padded(self, rows: int) -> Self:
        """With its last sample repeated up to so many."""
        missing = rows - len(self.latents)
        if missing <= 0:
            return self
        return self._each(lambda tensor: torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]))

    def copied(self) -> Self:
        return self._each(torch.clone)

    @torch.no_grad()
    def copy_(self, other: Self) -> None:
        """In place; shapes must be the same."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name), non_blocking=True)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        return tuple(getattr(self, field.name).shape for field in fields(self))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return type(self)(*(change(getattr(self, field.name)) for field in fields(self)))


def load_portion(
    data: EncodedSet, portion: Portion, step: int, *, config: ObjectiveConfig, seed: int, timesteps: int, flip: bool
) -> Batch:
    """The tensors of a portion. `timesteps`: how many of the schedule are drawn from; `flip`: whether half are
    mirrored."""
    return _stack([_sample(data, sample, step, config, seed, timesteps, flip) for sample in portion])


def ahead(tasks: Iterable[Callable[[], T]], depth: int = 2) -> Iterator[T]:
    """The tasks' results in order, the next `depth` of them made in a thread meanwhile."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def fixed_sample(data: EncodedSet, index: int, timestep: int, seed: int) -> Batch:
    """A held-out image as it is, at a given timestep, with the same noise each time: a batch of one."""
    item = data.items[index]
    stats = data.latents(item.index)
    noise = torch.randn(stats.mean.shape, generator=keyed(seed, "validation", item.sha256, timestep))
    text = data.text(item.index, 0)
    ids_1, ids_2 = data.tokens(item.index, 0)
    micro = data.micro(item.index, 0, False)
    row = (stats.mean, noise, torch.tensor(timestep), text.prompt_embeds, text.pooled, ids_1, ids_2, torch.ones(()))
    return _stack([(*row, torch.tensor(micro, dtype=torch.float32), torch.tensor(0, dtype=torch.int32))])


def _sample(
    data: EncodedSet, sample: Sample, step: int, config: ObjectiveConfig, seed: int, timesteps: int, flip: bool
) -> tuple[torch.Tensor, ...]:
    item = data.items[sample.item]
    generator = keyed(seed, "sample", step, sample.number)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    crop, mirrored, caption = below(item.crops), flip and below(2) == 1, below(item.captions)
    has_text = float(torch.rand((), generator=generator)) >= config.caption_dropout
    timestep = torch.randint(timesteps, (), generator=generator)
    stats = data.latents(item.index, crop, mirrored)
    latents = stats.mean + stats.std * torch.randn(stats.mean.shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    if config.noise_offset:
        shift = torch.randn(latents.shape[0], 1, 1, generator=generator)
        noise = offset_noise(noise, shift, config.noise_offset)
    text = data.text(item.index, caption) if has_text else data.null_text
    ids_1, ids_2 = data.tokens(item.index, caption) if has_text else data.null_tokens
    micro = torch.tensor(data.micro(item.index, crop, mirrored), dtype=torch.float32)
    key = torch.tensor(key_int32(seed, "dropout", step, sample.number), dtype=torch.int32)
    told = (text.prompt_embeds, text.pooled, ids_1, ids_2, torch.tensor(float(has_text)))
    return latents, noise, timestep, *told, micro, key


def _stack(rows: list[tuple[torch.Tensor, ...]]) -> Batch:
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))

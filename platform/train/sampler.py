"""Which images a step sees: a pure function of the seed and the step's number, whatever the number of workers."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from lorafleet.train.randomness import keyed


@dataclass(frozen=True)
class Sample:
    """One image of a step. `number`: its place among the step's images, what its random numbers are keyed by."""

    item: int
    number: int


Portion = tuple[Sample, ...]
"""Images of one size that are computed at once."""


@dataclass(frozen=True)
class StepPlan:
    """The portions of a step; worker r of n computes `portions[r::n]`."""

    step: int
    epoch: int
    portions: tuple[Portion, ...]

    @property
    def samples(self) -> int:
        return sum(len(portion) for portion in self.portions)


class Sampler:
    """Deals each epoch's images, every one of them once, into steps.

    An epoch shuffles each size's images, cuts them into portions (the last one of a size may be smaller) and shuffles
    the portions; the epoch's last step may have fewer than the others.
    """

    def __init__(
        self, items: Sequence[int], sizes: Sequence[Hashable], *, seed: int, batch_size: int, portion: int
    ) -> None:
        assert len(items) == len(sizes) > 0
        self._seed = seed
        self._portion = portion
        self._portions_a_step = batch_size // portion
        self._buckets: dict[Hashable, list[int]] = {}
        for item, size in zip(items, sizes, strict=True):
            self._buckets.setdefault(size, []).append(item)
        portions = sum(-(-len(bucket) // portion) for bucket in self._buckets.values())
        self.steps_per_epoch = -(-portions // self._portions_a_step)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def step(self, step: int) -> StepPlan:
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self._portions_a_step
        portions: list[Portion] = []
        number = 0
        for items in self._order(epoch)[first : first + self._portions_a_step]:
            portions.append(tuple(Sample(item, number + i) for i, item in enumerate(items)))
            number += len(items)
        return StepPlan(step, epoch, tuple(portions))

    def _shuffled(self, epoch: int) -> list[tuple[int, ...]]:
        generator = keyed(self._seed, "order", epoch)
        portions: list[tuple[int, ...]] = []
        for items in self._buckets.values():
            order = torch.randperm(len(items), generator=generator).tolist()
            shuffled = [items[i] for i in order]
            portions += [tuple(shuffled[i : i + self._portion]) for i in range(0, len(items), self._portion)]
        order = torch.randperm(len(portions), generator=generator).tolist()
        return [portions[i] for i in order]

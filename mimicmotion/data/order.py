"""Which samples a step takes: each sample of a bucket once an epoch, in an order that follows from (seed, step) alone.

A batch is of one bucket, so that its samples have one shape. The n samples of a bucket stand in one endless row, epoch
after epoch, each epoch shuffled by (seed, bucket, epoch); batch j of the bucket takes places j B to (j + 1) B - 1, B
being the batch over all ranks. So nothing depends on ranks, workers or micro-batches, and no sample is lost at the end
of an epoch: the batch that an epoch does not fill goes on with the next.

Buckets take turns in rounds. Round r has floor((r + 1) n / B) - floor(r n / B) batches of each bucket, shuffled by
(seed, r): in proportion to samples. After r rounds a bucket has given r n samples less fewer than B, so a bucket of
fewer samples than a batch comes every B / n rounds, with each sample B / n times, each time in another epoch.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_EPOCH, _ROUND = 1, 2  # what a shuffle is of: streams of random numbers that share a seed and nothing else


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where rounds begin to be counted: at a step, before which each bucket gave so many samples of its row."""

    step: int = 0
    taken: Mapping[str, int] = field(default_factory=dict)  # none of a bucket that is not named


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One sample of a step."""

    bucket: str
    epoch: int  # of the bucket, from 0
    sample: int  # its number in the bucket


class Order:
    """The order of samples of a run; num_samples: of each bucket, by its name."""

    def __init__(self, num_samples: Mapping[str, int], batch_size: int, seed: int, place: Place) -> None:
        self.num_samples = {name: num_samples[name] for name in sorted(num_samples)}
        self.batch_size, self.seed, self.place = batch_size, seed, place

    def pick(self, step: int, sample_id: int) -> Pick:
        """Sample `sample_id`, from 0 to below the batch size, of a step from the place's on."""
        name, batch = self._turn(step)
        row = self.place.taken.get(name, 0) + batch * self.batch_size + sample_id
        epoch, index = divmod(row, self.num_samples[name])
        order = _shuffled((self.seed, _EPOCH, number_of(name), epoch), self.num_samples[name])
        return Pick(bucket=name, epoch=epoch, sample=int(order[index]))

    def bucket(self, step: int) -> str:
        """The bucket of a step's batch."""
        return self._turn(step)[0]

    def taken(self, step: int) -> dict[str, int]:
        """How many samples of its row each bucket has given before a step."""
        counts = {name: self.place.taken.get(name, 0) for name in self.num_samples}
        if step > self.place.step:
            done, last = self._round(step - 1)
            for name in self.num_samples:
                counts[name] += self.batch_size * (self._batches(name, done) + last.count(name))
        return counts

    def _turn(self, step: int) -> tuple[str, int]:
        """The bucket of a step, and which of its batches, from 0 at the place, the step takes."""
        done, turns = self._round(step)
        name = turns[-1]
        return name, self._batches(name, done) + turns.count(name) - 1

    def _round(self, step: int) -> tuple[int, list[str]]:
        """The round of a step, and the buckets of its batches up to the step's."""
        number = step - self.place.step
        # a round with number / (n / B) before it has more than `number` batches before it once each bucket has one more
        beyond = (number + len(self.num_samples) + 1) * self.batch_size // sum(self.num_samples.values()) + 2
        found = bisect_right(range(beyond), number, key=self._all_batches) - 1
        names = [
            name
            for name in self.num_samples
            for _ in range(self._batches(name, found + 1) - self._batches(name, found))
        ]
        order = _shuffled((self.seed, _ROUND, self.place.step, found), len(names))
        return found, [names[index] for index in order[: number - self._all_batches(found) + 1]]

    def _batches(self, name: str, num_rounds: int) -> int:
        return num_rounds * self.num_samples[name] // self.batch_size

    def _all_batches(self, num_rounds: int) -> int:
        return sum(self._batches(name, num_rounds) for name in self.num_samples)


def number_of(name: str) -> int:
    """A name as a number that seeds random numbers."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@lru_cache(maxsize=32)  # a step asks for the same few shuffles sample after sample
def _shuffled(key: tuple[int, ...], length: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(key)).permutation(length)

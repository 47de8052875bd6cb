"""The stream of meta batches: endless, with random numbers of its own, resumable at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from meta_trainer.modules import Batch


class MetaBatchSampler(Sampler[list[int]]):
    """Endless batches of indices; the n-th is a function of the seed and n alone.

    The meta set is shuffled anew for each pass, the passes are laid end to end, and batches are cut from the whole:
    every batch is full, also where a pass ends or the set is smaller than a batch.

    Args:
        num_examples: Size of the meta set.
        batch_size: Examples in each replica's batch.
        seed: Of the permutations.
        start: Index n of the first batch.
        rank: Of this replica, whose batches are disjoint slices of a global one.
        world_size: Number of replicas.
    """

    def __init__(
        self, num_examples: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from `start` on, without end."""
        n = self.start
        while True:
            first = (n * self.world_size + self.rank) * self.batch_size
            yield [self._index(position) for position in range(first, first + self.batch_size)]
            n += 1

    def _index(self, position: int) -> int:
        number, offset = divmod(position, self.num_examples)
        return int(self._permutation(number)[offset])

    def _permutation(self, number: int) -> np.ndarray:
        if getattr(self, "_cached", (None, None))[0] != number:
            generator = np.random.default_rng(np.random.SeedSequence([self.seed, number]))
            self._cached = (number, generator.permutation(self.num_examples))
        return self._cached[1]


class MetaDataStream:
    """Collated meta batches, one after another.

    Batches are read in this process and draw nothing from the global random state by themselves.

    Args:
        dataset: A map-style data set.
        batch_size: Examples in each replica's batch.
        collate: From a list of examples to a batch.
        seed: Of the order.
        rank: Of this replica.
        world_size: Number of replicas.

    Raises:
        ValueError: If the data set has no length or is empty.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        collate: Callable[[list[Any]], Batch],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise ValueError(
                f"`meta_dataset` should be a map-style data set with a length, got {type(dataset).__name__}. "
                "A meta set is small: read it into a list."
            )
        if len(dataset) == 0:
            raise ValueError("`meta_dataset` should hold at least one example, got none.")
        self._loader = lambda start: DataLoader(
            dataset,
            batch_sampler=MetaBatchSampler(len(dataset), batch_size, seed, start, rank, world_size),
            collate_fn=collate,
            # Without a generator of its own, an iterator would take its seed from the global random state.
            generator=torch.Generator().manual_seed(seed),
        )
        self.seek(0)

    def seek(self, batches: int) -> None:
        """Continue as if that many batches had been read."""
        self.batches_read = batches
        self._iterator: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        """The next batch; the stream has no end."""
        if self._iterator is None:
            self._iterator = iter(self._loader(self.batches_read))
        self.batches_read += 1
        return next(self._iterator)

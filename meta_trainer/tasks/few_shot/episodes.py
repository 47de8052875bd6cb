"""Episodes: small classification problems, each a function of a seed and its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from meta_trainer.modules.meta_module import META_BATCH
from meta_trainer.tasks.few_shot.arguments import FewShotArguments
from meta_trainer.tasks.few_shot.images import Domain

EPOCHS, TRAIN, META, TEST = range(4)
"""Streams of random numbers."""

NUM_DECAYS = 20
DECAY = 0.9
"""In the course of training, the weight of the auxiliary loss is multiplied by 0.9 so many times."""


@dataclass(frozen=True)
class Episode:
    """A row of the data sets; what is in it follows from its number."""

    number: int
    is_test: bool = False


class EpisodeCollator:
    """Draw episodes and put them together to a batch.

    For every `episodes_per_epoch` training episodes, two of the training domains are drawn: the train batches are
    episodes of the pseudo-seen one, the meta batches of the pseudo-unseen one. All is a function of the seed and the
    number of the episode, so that a resumed run goes on with the episodes that it would have had.

    Args:
        arguments: The settings.
        domains: All domains, loaded.
        seed: Of the draws.
        carry_meta: Whether train batches hold a meta batch. Without, the pseudo-seen domains and their episodes are
            the same.

    Raises:
        ValueError: If a domain has fewer classes than an episode that have enough images for one.
    """

    def __init__(
        self, arguments: FewShotArguments, domains: dict[str, Domain], seed: int, carry_meta: bool = True
    ) -> None:
        self.arguments, self.seed, self.carry_meta = arguments, seed, carry_meta
        self.training = [domains[name] for name in arguments.training_domains]
        self.held_out = domains[str(arguments.held_out_domain)]
        self.size = arguments.k_shot + arguments.num_queries
        self.usable = {domain.name: _usable_classes(domain, arguments.n_way, self.size) for domain in domains.values()}
        sizes = [len(domain.rows) for domain in self.training]
        self.first_ids = dict(zip(arguments.training_domains, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.num_classes = sum(sizes)
        queries = torch.arange(arguments.n_way).repeat_interleave(arguments.num_queries)
        self.labels = queries  # [Q]

    def __call__(self, episodes: Sequence[Any]) -> dict[str, Any]:
        """The batch of E rows, `Episode` of one kind; see :meth:`RelationNet.forward`."""
        if episodes[0].is_test:
            return _stacked([self.draw(self.held_out, TEST, e.number)[0] for e in episodes], self.labels)
        seen, unseen = zip(*(self.domains_of(e.number) for e in episodes), strict=True)
        drawn = [self.draw(domain, TRAIN, e.number) for domain, e in zip(seen, episodes, strict=True)]
        batch = _stacked([pixels for pixels, _ in drawn], self.labels)
        if self.arguments.auxiliary_weight:
            batch["class_ids"] = torch.stack([ids for _, ids in drawn])  # [E, N]
            batch["auxiliary_weight"] = torch.tensor([self.auxiliary_weight(e.number) for e in episodes])  # [E]
        if self.carry_meta:
            meta = [self.draw(domain, META, e.number)[0] for domain, e in zip(unseen, episodes, strict=True)]
            # As the held-out domain is going to be: features of unseen images, normalized by what others left.
            batch[META_BATCH] = _stacked(meta, self.labels) | {"use_running_statistics": True}
        return batch

    def domains_of(self, number: int) -> tuple[Domain, Domain]:
        """The pseudo-seen and the pseudo-unseen domain of a training episode."""
        generator = self._generator(EPOCHS, number // self.arguments.episodes_per_epoch)
        seen, unseen = generator.choice(len(self.training), size=2, replace=False)
        return self.training[seen], self.training[unseen]

    def auxiliary_weight(self, number: int) -> float:
        """That of a training episode: it falls in equal steps, as in the official code."""
        progress = min(number / self.arguments.num_train_episodes, 1.0)
        return float(self.arguments.auxiliary_weight * DECAY ** int(NUM_DECAYS * progress))

    def draw(self, domain: Domain, stream: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images ``[N, 3, S, S]`` in [-1, 1], support first, and their classes ``[N]`` among all training classes."""
        generator = self._generator(stream, number)
        arguments = self.arguments
        classes = generator.choice(self.usable[domain.name], size=arguments.n_way, replace=False)
        drawn = np.stack([generator.choice(domain.rows[c], size=self.size, replace=False) for c in classes])
        order = np.concatenate([drawn[:, : arguments.k_shot].ravel(), drawn[:, arguments.k_shot :].ravel()])
        ids = np.concatenate([classes.repeat(arguments.k_shot), classes.repeat(arguments.num_queries)])
        pixels = torch.from_numpy(domain.images[order]).float() / 127.5 - 1
        return pixels, torch.from_numpy(ids + self.first_ids.get(domain.name, 0))

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, stream, number]))


def _stacked(pixels: Sequence[torch.Tensor], labels: torch.Tensor) -> dict[str, Any]:
    return {"pixel_values": torch.stack(list(pixels)), "labels": labels.repeat(len(pixels), 1)}  # [E, N, ...], [E, Q]


def _usable_classes(domain: Domain, n_way: int, size: int) -> np.ndarray:
    usable = np.array([number for number, rows in enumerate(domain.rows) if len(rows) >= size])
    if len(usable) < n_way:
        largest = max(map(len, domain.rows), default=0)
        raise ValueError(
            f"Domain {domain.name!r} has {len(usable)} classes of at least {size} images (k_shot + num_queries), and "
            f"an episode takes {n_way}; its largest class has {largest}. Lower num_queries, k_shot or n_way, or raise "
            "max_images_per_class."
        )
    return usable

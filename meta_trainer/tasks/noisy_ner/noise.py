"""Synthetic noise on entities."""

from collections.abc import Sequence

import numpy as np

from meta_trainer.tasks.label_noise import corrupt_labels
from meta_trainer.tasks.ner.tags import OUTSIDE

ENTITY_NOISE_KINDS = ("none", "uniform", "flip", "drop")

Entity = tuple[int, int, int]
"""Number of the sentence, first word, and the word after the last one."""


def corrupt_entities(
    tags: Sequence[Sequence[str]], types: Sequence[str], kind: str, share: float, seed: int
) -> list[list[str]]:
    """Give a share of the entities a wrong type, or none.

    Annotators mistake or miss whole entities, so that all words of an entity get the same treatment. ``uniform``
    noise takes any other type with the same probability; ``flip`` noise takes one other type, drawn once for each
    type; ``drop`` tags the words of the entity as ``O``. With one seed, the wrong entities of a smaller share are among
    those of a larger one.

    Args:
        tags: IOB2 tags of each sentence.
        types: The T entity types; at least two for ``uniform`` and ``flip``.
        kind: ``none``, ``uniform``, ``flip`` or ``drop``.
        share: Share of the entities, at least 0 and less than 1.
        seed: Of entities and types.

    Returns:
        Tags to train on; ``tags`` stay as they are.

    Raises:
        ValueError: If there is no such kind, or no other type to take.
    """
    if kind not in ENTITY_NOISE_KINDS:
        raise ValueError(f"Noise on entities is one of {', '.join(ENTITY_NOISE_KINDS)}, got {kind!r}.")
    noisy = [list(row) for row in tags]
    entities = find_entities(tags)
    if kind == "none" or not entities:
        return noisy
    numbers = np.array([types.index(tags[i][start][2:]) for i, start, _ in entities])  # [E]
    wrong_types: list[str | None]
    if kind == "drop":
        is_dropped = corrupt_labels(np.zeros_like(numbers), 2, "flip", share, seed)  # [E], of 0 and 1
        wrong_types = [None if dropped else types[n] for dropped, n in zip(is_dropped, numbers, strict=True)]
    else:
        if len(types) < 2:
            raise ValueError(f"label_noise={kind!r} needs two entity types, got {', '.join(types)}: take 'drop'.")
        wrong_types = [types[n] for n in corrupt_labels(numbers, len(types), kind, share, seed)]
    for (i, start, end), name in zip(entities, wrong_types, strict=True):
        for j in range(start, end):
            noisy[i][j] = OUTSIDE if name is None else noisy[i][j][:2] + name
    return noisy


def find_entities(tags: Sequence[Sequence[str]]) -> list[Entity]:
    """Return the entities of IOB2 tags, in their order."""
    entities: list[Entity] = []
    for i, row in enumerate(tags):
        for start, tag in enumerate(row):
            if tag[:2] == "B-":
                end = start + 1
                while end < len(row) and row[end][:2] == "I-":
                    end += 1
                entities.append((i, start, end))
    return entities

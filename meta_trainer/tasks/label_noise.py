"""Synthetic label noise."""

import numpy as np

NOISE_KINDS = ("none", "uniform", "flip")


def corrupt_labels(labels: np.ndarray, num_classes: int, kind: str, share: float, seed: int) -> np.ndarray:
    """Give a share of the rows a wrong label.

    ``uniform`` noise takes any other class with the same probability; ``flip`` noise takes one other class, drawn
    once for each class. Both always take another class, so that ``share`` is the share of wrong labels; uniform noise
    in Meta-Weight-Net also draws the true class, its ratio ``p`` is a share of ``p * (1 - 1 / num_classes)`` here.
    With one seed, the wrong labels of a smaller share are among those of a larger one.

    Args:
        labels: ``[N]``, true classes as integers.
        num_classes: Number C of classes.
        kind: ``none``, ``uniform`` or ``flip``.
        share: Share of wrong labels, at least 0 and less than 1.
        seed: Of rows and labels.

    Returns:
        ``[N]``, labels to train on; ``labels`` stays as it is.

    Raises:
        ValueError: If there is no such kind.

    References:
        Shu et al., `Meta-Weight-Net <https://arxiv.org/abs/1902.07379>`_, NeurIPS 2019.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"Label noise is one of {', '.join(NOISE_KINDS)}, got {kind!r}.")
    generator = np.random.default_rng(seed)
    distances = {
        "none": np.zeros_like(labels),
        "flip": generator.integers(1, num_classes, size=num_classes)[labels],
        "uniform": generator.integers(1, num_classes, size=len(labels)),
    }  # [N] each: from the true class to the wrong one, around the circle of classes
    noisy = labels.copy()
    wrong = generator.permutation(len(labels))[: round(share * len(labels))]
    noisy[wrong] = (labels[wrong] + distances[kind][wrong]) % num_classes
    return noisy

"""Which training rows are trusted and set apart, and which are trained on."""

from collections.abc import Sequence

import numpy as np


def split_off_meta(
    labels: np.ndarray, classes: Sequence[str], num_meta: int, max_train: int | None, seed: int, balanced: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a meta set, and the rows to train on from what is left.

    Every class has ``num_meta // C`` rows in a balanced meta set, the first ``num_meta % C`` classes one more. Nested:
    with one seed, a smaller meta set is part of a larger one, and so is a smaller draw of rows to train on.

    Args:
        labels: ``[N]``, trusted classes as integers.
        classes: Names of the C classes.
        num_meta: Size of the meta set; 0 for none.
        max_train: Most rows to train on; None: all that are left.
        seed: Of the draws.
        balanced: Whether every class has as many rows in the meta set; else classes come as they come in the data.

    Returns:
        Numbers of the meta rows and of the rows to train on; no row is in both.

    Raises:
        ValueError: If a class has too few rows for the meta set, or no row is left to train on.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    meta = _balanced(order, labels, classes, num_meta) if balanced else order[:num_meta]
    left = order[~np.isin(order, meta)]
    if not len(left):
        raise ValueError(f"num_meta_examples={num_meta} leaves none of {len(labels)} rows to train on: lower it.")
    return meta, left[:max_train]


def _balanced(order: np.ndarray, labels: np.ndarray, classes: Sequence[str], size: int) -> np.ndarray:
    """The first rows of every class."""
    share, rest = divmod(size, len(classes))
    parts = []
    for number, name in enumerate(classes):
        needed = share + (number < rest)
        rows = order[labels[order] == number]
        if len(rows) < needed:
            raise ValueError(
                f"num_meta_examples={size} takes {needed} training rows of each class, but class {name!r} has "
                f"{len(rows)}: lower it, or set balance_meta_set=false."
            )
        parts.append(rows[:needed])
    return np.concatenate(parts)

"""Whether a run trains on the meta set, too, how often, or on nothing else: what tasks with such baselines share."""

import math
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import TypeVar

Part = TypeVar("Part", bound=Sized)


@dataclass
class TrustedRowsArguments:
    """What a run trains on: rows that may be wrong, rows of the meta set, or both."""

    train_on_meta: bool = field(
        default=False,
        metadata={
            "help": "Train on the meta set as well: plain training, or with meta_module=meta_weight_net, where its "
            "rows count in full. With any other meta module, and for language models, for the baseline only."
        },
    )
    meta_repeats: int = field(
        default=1,
        metadata={
            "help": "Times that an epoch with train_on_meta goes through the meta set, which is much smaller than the "
            "training set."
        },
    )
    train_on_meta_alone: bool = field(
        default=False,
        metadata={
            "help": "Train on the meta set and on nothing else, repeated until it is as long as the training set would "
            "be, so that a run has as many steps: the baseline that says what the other rows are worth."
        },
    )

    @property
    def baseline(self) -> str:
        """What a run without a meta module is called in tables."""
        if self.train_on_meta_alone:
            return "plain training on the meta set"
        return "plain training on both sets" if self.train_on_meta else "plain training"

    def training_parts(self, train: Part, meta: Part, *, with_meta: bool, tells_trusted: bool = False) -> list[Part]:
        """What a run trains on, one part after another.

        Args:
            train: Rows that may be wrong.
            meta: Rows of the meta set.
            with_meta: Whether the run learns a meta module.
            tells_trusted: Whether that tells rows of the meta set from others.
        """
        if self.train_on_meta_alone and not with_meta:
            return [meta] * math.ceil(len(train) / len(meta))
        joint = self.train_on_meta and (tells_trusted or not with_meta)
        return [train, *[meta] * self.meta_repeats] if joint else [train]

    def _check_trusted_rows(self) -> None:
        if self.train_on_meta and self.train_on_meta_alone:
            raise ValueError("train_on_meta adds the meta set, train_on_meta_alone leaves the rest out: set one.")
        if self.meta_repeats < 1:
            raise ValueError(f"meta_repeats must be at least 1, got {self.meta_repeats}.")
        if self.meta_repeats > 1 and not self.train_on_meta:
            raise ValueError(
                f"meta_repeats={self.meta_repeats} is for train_on_meta=true, which trains on the meta set."
            )

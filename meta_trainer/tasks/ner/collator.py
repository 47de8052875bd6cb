"""Batches of source and target sentences."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForTokenClassification

from meta_trainer.modules.meta_module import IS_TRUSTED, META_BATCH

# Trainer gives evaluation rows to the same collator, so training rows are marked. Of all names that are no
# argument of a model's forward(), Trainer keeps this one when it removes unused columns.
SOURCE_MARK = "label"


def mark_rows(dataset: Dataset) -> Dataset:
    """Mark the rows to which :class:`SourceTargetCollator` is to add target sentences."""
    return dataset.add_column(SOURCE_MARK, [1] * len(dataset))


class SourceTargetCollator:
    """Add target sentences, and a meta batch of further ones, to each batch of marked source sentences.

    The batches of MetaXL (Xia et al., `<https://arxiv.org/abs/2104.07908>`_, 2021), whose official code cuts
    a batch of target sentences into a training half and a meta half. Rows without the mark are only padded.

    Args:
        pad: Pads rows into a batch.
        target: Encoded target sentences.
        target_batch_size: Target sentences trained on in each step.
        meta_batch_size: Target sentences of each meta batch, none of them in the same step's training batch;
            0: no meta batch.
        seed: Seed of the draws.
        mark_source: Whether batches say by ``is_source`` (bool, ``[B]``) which rows are source sentences.
        mark_target: Whether batches say by ``is_trusted`` (bool, ``[B]``) which rows are target sentences.
        carry_meta: Whether batches hold the meta batch. Its sentences are drawn in any case, so that a baseline trains
            on the same target sentences as the method that it stands beside.

    Raises:
        ValueError: If there are fewer target sentences than a step needs.
    """

    def __init__(
        self,
        pad: DataCollatorForTokenClassification,
        target: Dataset,
        target_batch_size: int,
        meta_batch_size: int,
        seed: int,
        mark_source: bool,
        mark_target: bool = False,
        carry_meta: bool = True,
    ) -> None:
        needed = target_batch_size + (meta_batch_size if carry_meta else 0)
        if len(target) < needed:
            raise ValueError(
                f"Each step takes {needed} distinct target sentences ({target_batch_size} to train on and "
                f"{meta_batch_size} for the meta batch), but there are {len(target)}: lower "
                "target_batch_size or the meta batch size, or give more target sentences."
            )
        self.pad = pad
        self.target = target.to_list()
        self.target_batch_size = target_batch_size
        self.meta_batch_size = meta_batch_size
        self.seed = seed
        self.mark_source = mark_source
        self.mark_target = mark_target
        self.carry_meta = carry_meta

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the padded source rows, then the target rows; ``meta_batch`` holds the meta rows, padded."""
        if SOURCE_MARK not in features[0]:
            return dict(self.pad(list(features)))
        source = [{key: value for key, value in row.items() if key != SOURCE_MARK} for row in features]
        drawn = self.draw(source)
        batch = dict(self.pad(source + drawn[: self.target_batch_size]))
        is_source = torch.arange(len(batch["input_ids"])) < len(source)  # [B]
        if self.mark_source:
            batch["is_source"] = is_source
        if self.mark_target:
            batch[IS_TRUSTED] = ~is_source
        if self.meta_batch_size and self.carry_meta:
            batch[META_BATCH] = dict(self.pad(drawn[self.target_batch_size :]))
        return batch

    def draw(self, source: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Draw the distinct target rows that go with a source batch.

        A function of the seed and the source sentences alone. A generator that advances would have to be
        saved and fast forwarded on resuming, and would repeat itself in every worker and rank, each of which
        holds a copy.
        """
        checksum = 0
        for row in source:
            checksum = zlib.crc32(np.asarray(row["input_ids"], dtype=np.int64).tobytes(), checksum)
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, checksum]))
        size = min(self.target_batch_size + self.meta_batch_size, len(self.target))
        return [self.target[i] for i in generator.choice(len(self.target), size=size, replace=False)]

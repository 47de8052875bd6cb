"""Texts to sub-tokens."""

import logging

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Encode the columns ``text`` and ``label`` for a sequence classifier; no other column is kept.

    How many texts are longer than ``max_length`` is logged as a warning.

    Args:
        rows: Texts and labels as integers.
        tokenizer: Of the model.
        max_length: Most sub-tokens of a text, special tokens included.

    Returns:
        Rows of ``input_ids``, ``attention_mask`` and ``labels``, in the same order.
    """
    encoded = tokenizer(
        list(rows["text"]),
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=True,
        return_token_type_ids=False,
    )
    # Slow tokenizers do not say what they leave out.
    num_cut = sum(bool(text.overflowing) for text in encoded.encodings or [])
    if num_cut:
        logger.warning("%d of %d texts are cut to %d sub-tokens (max_length).", num_cut, len(rows), max_length)
    columns = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    return Dataset.from_dict({**columns, "labels": list(rows["label"])})

"""Texts to sub-tokens."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Encode the columns ``text`` and ``label`` for a sequence classifier; no other column is kept.

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
    columns = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    return Dataset.from_dict({**columns, "labels": list(rows["label"])})

"""Words and tags to sub-tokens and labels."""

import logging
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from meta_trainer.tasks.ner.sentences import Sentences

IGNORED = -100  # the label that PyTorch's cross-entropy skips

logger = logging.getLogger(__name__)


def encode(sentences: Sentences, tokenizer: PreTrainedTokenizerBase, tags: Sequence[str], max_length: int) -> Dataset:
    """Encode sentences for a token classifier.

    A word's first sub-token carries its label; its further ones and special tokens carry -100. Words without
    a sub-token of their own, because they lie beyond ``max_length`` or the tokenizer drops all their
    characters, have no label and so take no part in loss or score; their number is logged as a warning.

    Args:
        sentences: Words and tags; each tag is one of ``tags``.
        tokenizer: A fast tokenizer, which knows the word that each sub-token comes from.
        tags: The classes in the order of their ids.
        max_length: Most sub-tokens of a sentence, special tokens included.

    Returns:
        Rows of ``input_ids``, ``attention_mask`` and ``labels``, in the order of the sentences.

    Raises:
        ValueError: If the tokenizer is a slow one.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot say from which word a sub-token "
            "comes; give a tokenizer_name that has a tokenizer.json."
        )
    encoded = tokenizer(
        sentences.tokens,
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=True,
        return_token_type_ids=False,
    )
    ids = {tag: number for number, tag in enumerate(tags)}
    labels = [_align(encoded.word_ids(i), [ids[tag] for tag in row]) for i, row in enumerate(sentences.tags)]
    _warn_of_lost_words(sentences, labels, max_length)
    columns = {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": labels,
    }
    return Dataset.from_dict(columns)


def _align(word_ids: Sequence[int | None], word_labels: Sequence[int]) -> list[int]:
    labels = []
    previous = None
    for word in word_ids:
        labels.append(IGNORED if word is None or word == previous else word_labels[word])
        previous = word
    return labels


def _warn_of_lost_words(sentences: Sentences, labels: Sequence[Sequence[int]], max_length: int) -> None:
    words = sum(map(len, sentences.tokens))
    kept = sum(label != IGNORED for row in labels for label in row)
    if kept < words:
        logger.warning(
            "%s: %d of %d words lie beyond %d sub-tokens or have none; they take no part in loss or score.",
            sentences.name, words - kept, words, max_length,
        )  # fmt: skip

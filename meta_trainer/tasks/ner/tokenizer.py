"""The tokenizer of a run: a pretrained one, or one trained on the sentences."""

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.tokenizer import load_tokenizer, train_byte_level_bpe


def make_tokenizer(model: ModelArguments, training_sets: Sequence[Sentences]) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the settings name, or train one on the training sentences.

    Raises:
        ValueError: If it cannot be loaded, or has no padding token.
    """
    name = model.tokenizer_name or model.model_name_or_path
    if name is None:
        return train_tokenizer(training_sets, model.vocab_size)
    return load_tokenizer(name, model, words=True)


def train_tokenizer(training_sets: Sequence[Sentences], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the words of the sentences; no character is unknown to it.

    A set n times smaller than the largest is repeated sqrt(n) times, so that words of the target language get
    pieces of their own: the sampling with exponent 0.5 of XLM (Lample and Conneau,
    `<https://arxiv.org/abs/1901.07291>`_, 2019).

    Raises:
        ValueError: If ``vocab_size`` has no room for the 256 bytes and the special tokens.
    """
    largest = max(map(len, training_sets))
    texts = (
        " ".join(words)
        for sentences in training_sets
        for _ in range(round(math.sqrt(largest / len(sentences))))
        for words in sentences.tokens
    )
    return train_byte_level_bpe(texts, vocab_size)

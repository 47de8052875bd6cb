"""Which word each label of the training set belongs to, and what its tags are."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from meta_trainer.tasks.ner.sentences import Sentences


def record_labels(
    sentences: Sentences, trusted: Sentences, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Describe each label of encoded sentences: see `meta_trainer.tasks.ner.encoding.encode`.

    Args:
        sentences: Words, and tags to train on.
        trusted: The same sentences with the tags that they should have.
        tokenizer: Of the model.
        max_length: Most sub-tokens of a sentence, special tokens included.

    Returns:
        A row for each word that has a label, in order: ``row`` (number of the sentence in the file, from 0), ``token``
        (number of the word in the sentence, from 0), ``word``, ``text`` (the sentence), ``label``, ``trusted_label``
        and ``is_corrupted``.
    """
    encoded = tokenizer(sentences.tokens, is_split_into_words=True, truncation=True, max_length=max_length)
    rows = []
    for i, words in enumerate(sentences.tokens):
        text = " ".join(words)
        labelled = dict.fromkeys(word for word in encoded.word_ids(i) if word is not None)
        for j in labelled:
            tag, truth = sentences.tags[i][j], trusted.tags[i][j]
            rows.append((sentences.rows[i], j, words[j], text, tag, truth, tag != truth))
    names = ("row", "token", "word", "text", "label", "trusted_label", "is_corrupted")
    return Dataset.from_dict({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})

import logging

import pytest
from transformers import BertTokenizerLegacy, PreTrainedTokenizerFast

from meta_trainer.tasks.ner.encoding import encode
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tokenizer import train_tokenizer

TAGS = ["O", "B-PER", "I-PER"]
SENTENCES = Sentences(
    "news", [["Ada", "Lovelace", "wrote"], ["Rain"]], [["B-PER", "I-PER", "O"], ["O"]]
)  # fmt: skip


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows single bytes and the frequent word `wrote` alone."""
    return train_tokenizer([Sentences("", [["wrote"]] * 50, [["O"]] * 50)], 270)


def test_the_first_sub_token_of_a_word_carries_its_label_and_all_else_is_ignored(tokenizer):
    encoded = encode(SENTENCES, tokenizer, TAGS, 64)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    # [CLS], then a space and the letters of a word as bytes, `wrote` in one piece, [SEP].
    ada, lovelace, wrote = [1, *[-100] * 3], [2, *[-100] * 8], [0]
    assert encoded["labels"][0] == [-100, *ada, *lovelace, *wrote, -100]
    assert encoded["labels"][1] == [-100, 0, *[-100] * 4, -100]
    assert tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True) == " Ada Lovelace wrote"


def test_words_beyond_the_limit_have_no_label_and_are_counted_in_a_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        encoded = encode(SENTENCES, tokenizer, TAGS, 6)
    assert encoded["labels"][0] == [-100, 1, -100, -100, -100, -100]
    assert "news: 2 of 4 words lie beyond 6 sub-tokens" in caplog.text


def test_sentences_that_fit_give_no_warning(tokenizer, caplog):
    encode(SENTENCES, tokenizer, TAGS, 64)
    assert not caplog.records


def test_a_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nada\n")
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    with pytest.raises(ValueError, match="BertTokenizerLegacy is a slow tokenizer"):
        encode(SENTENCES, slow, TAGS, 64)

import hashlib
import subprocess
import sys

import pytest

from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.ner.corpus import generate_corpus
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tokenizer import make_tokenizer, train_tokenizer

TRAIN = """
from meta_trainer.tasks.ner.corpus import generate_corpus
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tokenizer import train_tokenizer
tokens = generate_corpus("fi_FI", "train", size=200).to_dict()["tokens"]
print(train_tokenizer([Sentences("", tokens, [])], 600).backend_tokenizer.to_str())
"""


def test_training_in_another_process_gives_the_same_tokenizer():
    tokens = generate_corpus("fi_FI", "train", size=200).to_dict()["tokens"]
    here = train_tokenizer([Sentences("", tokens, [])], 600).backend_tokenizer.to_str()
    there = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True).stdout.strip()
    assert hashlib.sha256(there.encode()).hexdigest() == hashlib.sha256(here.encode()).hexdigest()


def test_no_character_is_unknown_and_sentences_are_enclosed():
    tokenizer = train_tokenizer([Sentences("", [["Turin"]], [["O"]])], 300)
    words = ["Turku", "Ελλάδα", "東京"]
    encoded = tokenizer(words, is_split_into_words=True)
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    assert encoded["input_ids"][0] == tokenizer.cls_token_id
    assert encoded["input_ids"][-1] == tokenizer.sep_token_id
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True).split() == words


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=200 is too small: 256 bytes and 4 special tokens"):
        train_tokenizer([Sentences("", [["Turin"]], [["O"]])], 200)


def test_a_tokenizer_that_cannot_be_found_is_refused(tmp_path):
    name = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"No tokenizer can be loaded from '{name}'"):
        make_tokenizer(ModelArguments(tokenizer_name=name), [])


def test_a_saved_tokenizer_is_loaded_by_its_folder(tmp_path):
    trained = train_tokenizer([Sentences("", [["Turin"] * 5] * 20, [])], 300)
    trained.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = make_tokenizer(ModelArguments(tokenizer_name=str(tmp_path)), [])
    assert loaded("Turin")["input_ids"] == trained("Turin")["input_ids"]


def test_frequent_words_of_a_small_set_get_pieces_of_their_own_beside_a_large_one():
    large = Sentences("", [["Turin", f"{i:03d}"] for i in range(900)], [])
    small = Sentences("", [["kaupunki"]] * 9, [])
    alone = train_tokenizer([Sentences("", large.tokens + small.tokens, [])], 300)
    balanced = train_tokenizer([large, small], 300)
    assert len(balanced.tokenize("kaupunki")) < len(alone.tokenize("kaupunki"))

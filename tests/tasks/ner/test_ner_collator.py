from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForTokenClassification

from meta_trainer.tasks.ner.collator import SourceTargetCollator, mark_rows
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tokenizer import train_tokenizer

SOURCE, TARGET = 1000, 2000  # first ids: a row says by itself where it comes from


def rows(first: int, count: int) -> Dataset:
    """Row i is made of i % 3 + 1 copies of the id ``first + i``."""
    ids = [[first + i] * (i % 3 + 1) for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": ids})


def collator(count: int = 12, **changes: Any) -> SourceTargetCollator:
    pad = DataCollatorForTokenClassification(train_tokenizer([Sentences("", [["a"]], [["O"]])], 300))
    settings = {"target_batch_size": 3, "meta_batch_size": 4, "seed": 0, "mark_source": True}
    return SourceTargetCollator(pad, rows(TARGET, count), **(settings | changes))


def source_features(*indices: int) -> list[dict[str, Any]]:
    return mark_rows(rows(SOURCE, 20)).select(indices).to_list()


def first_ids(batch: dict[str, Any]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def test_source_rows_come_first_and_are_marked():
    batch = collator()(source_features(0, 1, 2, 3))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "is_source", "meta_batch"}
    assert first_ids(batch)[:4] == [SOURCE, SOURCE + 1, SOURCE + 2, SOURCE + 3]
    assert all(i >= TARGET for i in first_ids(batch)[4:])
    assert batch["is_source"].dtype == torch.bool
    assert batch["is_source"].tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize("mark_source", [True, False])
def test_target_rows_are_trusted_where_batches_are_to_say_so(mark_source):
    marked = collator(mark_source=mark_source, mark_target=True)(source_features(0, 1, 2, 3))
    plain = collator(mark_source=mark_source)(source_features(0, 1, 2, 3))
    trusted = marked.pop("is_trusted")
    assert trusted.dtype == torch.bool
    assert trusted.tolist() == [first >= TARGET for first in first_ids(marked)] == [False] * 4 + [True] * 3
    assert marked.keys() == plain.keys()
    assert all(torch.equal(marked[key], plain[key]) for key in plain if key != "meta_batch")
    assert set(marked["meta_batch"]) == {"input_ids", "attention_mask", "labels"}


def test_evaluation_rows_are_never_trusted():
    batch = collator(mark_target=True)(rows(SOURCE, 3).to_list())
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_padding_is_outside_the_attention_and_the_loss():
    batch = collator()(source_features(0, 2))
    assert batch["attention_mask"][0].tolist() == [1, 0, 0]
    assert batch["labels"][0].tolist() == [SOURCE, -100, -100]
    assert set(batch["meta_batch"]) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("batch_index", range(8))
def test_train_and_meta_half_share_no_sentence_and_repeat_none(batch_index):
    batch = collator(count=7)(source_features(batch_index, batch_index + 1))
    drawn = first_ids(batch)[2:] + first_ids(batch["meta_batch"])
    assert sorted(drawn) == list(range(TARGET, TARGET + 7))


def test_a_draw_depends_on_seed_and_source_sentences_alone():
    one, other = collator(), collator()
    other(source_features(5, 6))  # a collator that has drawn before draws the same
    assert first_ids(one(source_features(0, 1))) == first_ids(other(source_features(0, 1)))

    draws = [first_ids(collator(seed=seed)(source_features(0, 1)))[2:] for seed in range(5)]
    assert len({tuple(draw) for draw in draws}) > 1
    draws = [first_ids(collator()(source_features(i, i + 1)))[2:] for i in range(5)]
    assert len({tuple(draw) for draw in draws}) > 1


def test_all_target_sentences_are_drawn_equally_often():
    draw = collator(count=10, target_batch_size=2, meta_batch_size=0)
    counts = torch.zeros(10)
    for i in range(400):
        for row in draw.draw([{"input_ids": [i]}]):
            counts[row["input_ids"][0] - TARGET] += 1
    expected = 400 * 2 / 10
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 27.9  # 99.9% quantile at 9 degrees of freedom


def test_joint_training_has_target_rows_but_neither_marks_nor_meta_batch():
    batch = collator(meta_batch_size=0, mark_source=False)(source_features(0, 1))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert len(batch["input_ids"]) == 5


def test_rows_without_the_mark_are_only_padded():
    batch = collator()(rows(SOURCE, 3).to_list())
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert first_ids(batch) == [SOURCE, SOURCE + 1, SOURCE + 2]


def test_too_few_target_sentences_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"takes 7 distinct target sentences \(3 to train on and 4 .* there are 6"):
        collator(count=6)


def test_a_baseline_trains_on_the_target_sentences_of_the_method_beside_it():
    features = source_features(0, 1)
    method, baseline = collator()(features), collator(carry_meta=False, mark_source=False)(features)
    assert set(baseline) == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(baseline["input_ids"], method["input_ids"])


def test_a_baseline_needs_no_sentences_for_a_meta_batch():
    assert len(collator(count=3, carry_meta=False)(source_features(0))["input_ids"]) == 1 + 3

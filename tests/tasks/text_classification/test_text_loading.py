import json
from pathlib import Path

import numpy as np
import pytest

from meta_trainer.tasks.text_classification import TextClassificationArguments
from meta_trainer.tasks.text_classification.corpus import generate_corpus
from meta_trainer.tasks.text_classification.loading import load_text_data


def true_labels(rows: list[dict], classes: list[str]) -> list[str]:
    """Labels of the corpus at the numbers that the rows have there."""
    topics = generate_corpus("train")["label"]
    assert [row["text"] for row in rows] == [generate_corpus("train")["text"][row["row"]] for row in rows]
    return [classes.index(topics[row["row"]]) for row in rows]


@pytest.mark.parametrize("kind", ["uniform", "flip"])
def test_noise_is_in_the_training_labels_alone_and_is_recorded(generated, kind):
    data = load_text_data(generated(label_noise=kind, label_noise_share=0.4), seed=1)
    train, meta = data.train.to_list(), data.meta.to_list()
    assert [row["trusted_label"] for row in train] == true_labels(train, data.classes)
    assert [row["is_corrupted"] for row in train] == [row["label"] != row["trusted_label"] for row in train]
    assert sum(row["is_corrupted"] for row in train) == round(0.4 * len(train))
    assert [row["label"] for row in meta] == true_labels(meta, data.classes)
    assert not any(row["is_corrupted"] for row in meta)
    for split, rows in (("validation", data.validation), ("test", data.test)):
        assert [data.classes[label] for label in rows["label"]] == generate_corpus(split)["label"]


@pytest.mark.parametrize("changes", [{}, {"max_train_examples": 40}, {"label_noise": "flip", "label_noise_share": 0.9}])
def test_the_meta_set_is_balanced_and_disjoint_from_the_training_rows(generated, changes):
    data = load_text_data(generated(num_meta_examples=20, **changes), seed=1)
    assert np.bincount(data.meta["label"]).tolist() == [5, 5, 5, 5]
    assert len(data.train) == changes.get("max_train_examples", 100)
    assert not set(data.meta["row"]) & set(data.train["row"])


def test_noise_does_not_change_which_rows_are_drawn(generated):
    clean = load_text_data(generated(), seed=1)
    noisy = load_text_data(generated(label_noise="uniform", label_noise_share=0.5), seed=2)
    assert clean.train["row"] == noisy.train["row"]
    assert clean.meta.to_list() == noisy.meta.to_list()


def test_the_noise_follows_the_seed_of_the_run_unless_it_has_its_own(generated):
    def labels(seed: int, **changes: int) -> list[int]:
        arguments = generated(label_noise="uniform", label_noise_share=0.5, **changes)
        return list(load_text_data(arguments, seed).train["label"])

    assert labels(1) == labels(1)
    assert labels(1) != labels(2)
    assert labels(1, noise_seed=7) == labels(2, noise_seed=7) == labels(7)


def test_real_noisy_labels_are_trained_on_and_all_other_sets_have_trusted_ones(write_rows):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2], "noisy": "abb"[i % 3]} for i in range(30)]
    train = write_rows("train.jsonl", rows)
    test = write_rows("test.jsonl", [{"text": "u", "label": "b", "noisy": None}])
    arguments = TextClassificationArguments(
        train_file=train, test_file=test, train_label_column="noisy", num_meta_examples=6
    )
    data = load_text_data(arguments, seed=1)
    for row in data.train.to_list():
        assert data.classes[row["label"]] == rows[row["row"]]["noisy"]
        assert data.classes[row["trusted_label"]] == rows[row["row"]]["label"]
    assert any(data.train["is_corrupted"])
    for row in data.meta.to_list():
        assert data.classes[row["label"]] == rows[row["row"]]["label"]
    assert data.test.to_list() == [{"text": "u", "label": 1}]
    assert data.validation is None


def test_rows_are_left_out_of_the_training_file_only(write_rows):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2], "dup": i < 10} for i in range(30)]
    path = write_rows("train.jsonl", rows)
    arguments = TextClassificationArguments(train_file=path, test_file=path, exclude_column="dup", num_meta_examples=4)
    data = load_text_data(arguments, seed=1)
    assert sorted([*data.train["row"], *data.meta["row"]]) == list(range(10, 30))
    assert len(data.test) == 30


def test_a_local_folder_in_the_layout_of_the_hub_is_read_by_split(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "news" / "small"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(6)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = TextClassificationArguments(
        data="news", subset="small", data_dir=str(tmp_path), validation_split=None, num_meta_examples=2
    )
    data = load_text_data(arguments, seed=1)
    assert data.classes == ["0", "1"]
    assert len(data.train) == 4
    assert data.test["text"][0] == "test 0"
    assert arguments.dataset_name == "news (small)"


def test_a_split_that_the_generated_corpus_does_not_have_is_refused(generated):
    with pytest.raises(ValueError, match="got 'gold'"):
        load_text_data(generated(train_split="gold"), seed=1)


@pytest.mark.real_data
def test_trec_and_the_distant_labels_of_hausa_headlines_are_loaded(data_dir):
    trec = TextClassificationArguments(
        data_dir=str(data_dir),
        train_file="text/trec6_train.parquet",
        test_file="text/trec6_test.parquet",
        exclude_column="dup",
    )
    data = load_text_data(trec, seed=1)
    assert data.classes == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert (len(data.train), len(data.meta), len(data.test)) == (5452 - 10 - 200, 200, 500)
    hausa = TextClassificationArguments(
        data_dir=str(data_dir),
        train_file="text/hausa_newsclass_train.parquet",
        test_file="text/hausa_newsclass_test.parquet",
        train_label_column="noisy_label",
    )
    data = load_text_data(hausa, seed=1)
    assert np.mean(data.train["is_corrupted"]) == pytest.approx(0.5, abs=0.03)


def test_a_file_of_trusted_rows_is_the_meta_set_and_leaves_all_others_to_train_on(write_rows):
    doubtful = write_rows("train.jsonl", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(9)])
    checked = write_rows("checked.jsonl", [{"text": f"c{i}", "label": "abc"[i % 3]} for i in range(5)])
    arguments = TextClassificationArguments(train_file=doubtful, meta_file=checked)
    data = load_text_data(arguments, seed=0)
    assert data.classes == ["a", "b", "c"]
    assert sorted(data.train["text"]) == [f"t{i}" for i in range(9)]
    assert list(data.meta["text"]) == [f"c{i}" for i in range(5)]
    assert list(data.meta["label"]) == [0, 1, 2, 0, 1]
    assert "is_corrupted" not in data.train.column_names
    noise = {"label_noise": "flip", "label_noise_share": 0.5}
    corrupted = TextClassificationArguments(train_file=doubtful, meta_file=checked, **noise)
    assert sum(load_text_data(corrupted, seed=0).train["is_corrupted"]) == 4
    apart = TextClassificationArguments(train_file=doubtful, num_meta_examples=2)
    assert not any(load_text_data(apart, seed=0).train["is_corrupted"])


@pytest.mark.parametrize("unknown", [{}, {"label": None}], ids=["no column", "an empty one"])
def test_beside_a_file_of_trusted_rows_others_may_have_noisy_labels_alone(write_rows, unknown):
    doubtful = write_rows("train.jsonl", [{"text": f"t{i}", "rule": "ab"[i % 2], **unknown} for i in range(9)])
    checked = write_rows("checked.jsonl", [{"text": f"c{i}", "label": "abc"[i % 3]} for i in range(5)])
    settings = {"train_file": doubtful, "train_label_column": "rule", "num_meta_examples": 2}
    data = load_text_data(TextClassificationArguments(meta_file=checked, **settings), seed=0)
    assert data.classes == ["a", "b", "c"]
    assert [data.classes[label] for label in data.train["label"]] == ["ab"[row % 2] for row in data.train["row"]]
    assert data.train.column_names == ["row", "text", "label"]
    with pytest.raises(ValueError, match=r"no column 'label'|column 'label': expected a label"):
        load_text_data(TextClassificationArguments(**settings), seed=0)


def test_labels_that_are_known_are_used_where_a_file_of_trusted_rows_is_given(write_rows):
    rows = [{"text": f"t{i}", "rule": "a", "label": "ab"[i % 2]} for i in range(8)]
    checked = write_rows("checked.jsonl", rows[:2])
    settings = {"train_file": write_rows("train.jsonl", rows), "meta_file": checked, "train_label_column": "rule"}
    data = load_text_data(TextClassificationArguments(**settings), seed=0)
    assert data.train["is_corrupted"][:] == [row % 2 == 1 for row in data.train["row"]]

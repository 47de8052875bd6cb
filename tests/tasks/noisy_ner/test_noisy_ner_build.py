import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from noisy_rows import ROWS

from meta_trainer.tasks import ModelArguments, Task
from meta_trainer.tasks.ner.corpus import SIZES, generate_corpus
from meta_trainer.tasks.noisy_ner import NoisyNerArguments, build_noisy_ner_task
from meta_trainer.tasks.noisy_ner.loading import load_noisy_ner_data

TINY = ModelArguments(hidden_size=16, num_hidden_layers=1, intermediate_size=16, vocab_size=400)


def build(arguments: NoisyNerArguments, **changes: Any) -> Task:
    return build_noisy_ner_task(arguments, TINY, **({"seed": 1, "with_meta": True} | changes))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def generated(monkeypatch):
    for split in ("train", "validation", "test"):
        monkeypatch.setitem(SIZES, split, 40)

    def make(**changes: object) -> NoisyNerArguments:
        return NoisyNerArguments(**({"data": "generated", "num_meta_examples": 10, "max_length": 48} | changes))

    return make


def test_a_column_of_noisy_tags_is_trained_on_and_the_trusted_ones_are_recorded(file):
    arguments = NoisyNerArguments(
        train_file=file, train_tags_column="noisy_ner_tags", exclude_column="dup", num_meta_examples=1
    )
    data = load_noisy_ner_data(arguments, seed=0)
    rows = data.train.rows
    # The second row is left out and one of the others is in the meta set; numbers are those of the file.
    assert sorted([*rows, *data.meta.rows]) == [0, 2, 3]
    assert data.train.tags == [ROWS[i]["noisy_ner_tags"] for i in rows]
    assert data.train_trusted.tags == [ROWS[i]["ner_tags"] for i in rows]
    assert data.meta.tags == [ROWS[i]["ner_tags"] for i in data.meta.rows]
    assert data.tags == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_the_record_has_a_row_for_each_label_in_the_order_of_the_training_set(generated):
    task = build(generated(label_noise="flip", label_noise_share=0.5))
    names, labels = task.model_init().config.id2label, [id for row in task.train_dataset["labels"] for id in row]
    record = task.training_labels
    assert list(record["label"]) == [names[label] for label in labels if label != -100]
    corpus = generate_corpus("en_US", "train")
    for row in record.to_list():
        assert corpus[row["row"]]["tokens"][row["token"]] == row["word"]
        assert corpus[row["row"]]["ner_tags"][row["token"]] == row["trusted_label"]
        assert row["text"] == " ".join(corpus[row["row"]]["tokens"])
        assert row["is_corrupted"] == (row["label"] != row["trusted_label"])
    assert 0.05 < sum(record["is_corrupted"]) / len(record) < 0.5


def test_words_that_are_cut_off_have_no_row(generated):
    task = build(generated(max_length=8))
    assert len(task.training_labels) == sum(label != -100 for row in task.train_dataset["labels"] for label in row)
    assert len(task.training_labels) < sum(len(row["tokens"]) for row in generate_corpus("en_US", "train"))


def test_the_meta_set_is_set_apart_and_clean_with_a_meta_module_or_without(generated):
    noise = {"label_noise": "drop", "label_noise_share": 0.5}
    method, plain = (build(generated(**noise), with_meta=with_meta) for with_meta in (True, False))
    assert (len(method.train_dataset), len(method.meta_dataset)) == (30, 10)
    assert plain.meta_dataset is None
    assert plain.train_dataset.to_list() == method.train_dataset.to_list()
    both = build(generated(**noise, train_on_meta=True), with_meta=False)
    assert both.train_dataset.to_list() == [*method.train_dataset.to_list(), *method.meta_dataset.to_list()]
    added = both.training_labels.select(range(len(plain.training_labels), len(both.training_labels)))
    assert not any(added["is_corrupted"])
    assert (both.baseline, both.main_metric) == ("plain training on both sets", "f1")


def test_the_baseline_on_the_meta_set_alone_has_as_many_steps_as_that_on_the_noisy_set(generated):
    noise = {"label_noise": "drop", "label_noise_share": 0.5, "train_on_meta_alone": True}
    method, alone = (build(generated(**noise), with_meta=with_meta) for with_meta in (True, False))
    assert alone.train_dataset.to_list() == method.meta_dataset.to_list() * 3
    assert not any(alone.training_labels["is_corrupted"])
    assert len(alone.training_labels) == sum(x != -100 for row in alone.train_dataset["labels"] for x in row)


def test_a_meta_module_that_tells_trusted_sentences_trains_on_both_sets(generated):
    noise = {"label_noise": "drop", "label_noise_share": 0.5, "train_on_meta": True, "meta_repeats": 2}
    method, both = build(generated(**noise), tells_trusted=True), build(generated(**noise), with_meta=False)
    assert (method.num_trusted, both.num_trusted) == (20, 0)
    assert method.train_dataset["is_trusted"][:] == [False] * 30 + [True] * 20
    assert method.train_dataset.remove_columns("is_trusted").to_list() == both.train_dataset.to_list()
    assert method.training_labels.to_list() == both.training_labels.to_list()[: len(method.training_labels)]
    assert set(method.training_labels["row"]) < set(both.training_labels["row"])


def test_types_are_renamed_and_dropped_in_all_sets(generated):
    data = load_noisy_ner_data(generated(map_tags=["ORG=O", "LOC=PLACE"]), seed=0)
    assert data.tags == ["O", "B-PER", "I-PER", "B-PLACE", "I-PLACE"]
    with pytest.raises(ValueError, match="no entity of type FOOD in the data; it has LOC, ORG, PER"):
        load_noisy_ner_data(generated(map_tags=["FOOD=O"]), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_meta_examples": 0}, "num_meta_examples must be at least 1, got 0"),
        ({"num_meta_examples": 40}, "num_meta_examples=40 leaves none of 40 sentences to train on"),
        ({"max_length": 600}, "max_length=600 is more than the 512 sub-tokens"),
        ({"train_tags_column": "noisy"}, "has no column 'noisy'"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(generated, changes, message):
    with pytest.raises(ValueError, match=message):
        build(generated(**changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "No sentences to train on: give data or train_file"),
        ({"data": "generated", "label_noise": "typo"}, "label_noise must be one of none, uniform, flip, drop, got"),
        ({"data": "generated", "label_noise_share": 0.4}, "needs a kind of noise: set label_noise to uniform or flip"),
        (
            {"data": "generated", "label_noise": "drop", "train_tags_column": "noisy"},
            "train_tags_column='noisy' holds noisy labels already",
        ),
        ({"data": "generated", "map_tags": ["DATE"]}, "expected entries such as PERSON=PER"),
        ({"data": "generated", "train_file": "x.jsonl"}, "exclude each other"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NoisyNerArguments(**settings)


def test_a_conll_file_has_no_second_column_of_tags(tmp_path):
    file = tmp_path / "train.conll"
    file.write_text("Ada B-PER\n\nsaw O\n\nTurin B-LOC\n")
    arguments = NoisyNerArguments(train_file=str(file), train_tags_column="noisy", num_meta_examples=1)
    with pytest.raises(ValueError, match=r"train_tags_column='noisy': .* is a CoNLL file, which has no such column"):
        load_noisy_ner_data(arguments, seed=0)


def test_a_file_of_trusted_sentences_is_the_meta_set_and_leaves_all_others_to_train_on(generated, file):
    task = build(generated(meta_file=file, num_meta_examples=0))
    assert (len(task.train_dataset), len(task.meta_dataset)) == (40, len(ROWS))
    assert task.training_labels.column_names == ["row", "token", "word", "text", "label"]
    noise = {"label_noise": "drop", "label_noise_share": 0.5}
    assert "is_corrupted" in build(generated(meta_file=file, **noise)).training_labels.column_names
    data = load_noisy_ner_data(generated(meta_file=file), seed=0)
    assert data.meta.tags == [row["ner_tags"] for row in ROWS]


@pytest.mark.parametrize("unknown", [{}, {"ner_tags": None}], ids=["no column", "an empty one"])
def test_beside_a_file_of_trusted_sentences_others_may_have_noisy_tags_alone(file, tmp_path, unknown):
    rows = [{"tokens": row["tokens"], "noisy_ner_tags": row["noisy_ner_tags"], **unknown} for row in ROWS]
    doubtful = tmp_path / "doubtful.jsonl"
    doubtful.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train_file": str(doubtful), "train_tags_column": "noisy_ner_tags", "num_meta_examples": 1}
    task = build(NoisyNerArguments(meta_file=file, **settings))
    assert task.training_labels.column_names == ["row", "token", "word", "text", "label"]
    assert [row["label"] for row in task.training_labels.to_list() if row["row"] == 0] == ROWS[0]["noisy_ner_tags"]
    with pytest.raises(ValueError, match=r"no column 'ner_tags'|expected lists of words and of tags, got .* None"):
        build(NoisyNerArguments(**settings))


def with_types(path: Path, rows: list[dict[str, Any]], **names: str) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for old, new in names.items():
        text = text.replace(f"-{old}", f"-{new}")
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("kind", ["meta", "validation", "test"])
def test_a_scored_or_trusted_set_without_a_type_to_train_on_is_refused(file, tmp_path, kind):
    other = with_types(tmp_path / "other.jsonl", ROWS, PER="Person", LOC="Location")
    arguments = NoisyNerArguments(train_file=file, num_meta_examples=1, **{f"{kind}_file": other})
    with pytest.raises(
        ValueError, match=r"other\.jsonl \(Location, Person\) is one of .*train.* \(LOC, PER\): .*map_tags"
    ):
        load_noisy_ner_data(arguments, seed=0)


def test_the_types_to_train_on_are_those_of_the_noisy_tags(tmp_path, caplog):
    rows = [{**row, "noisy_ner_tags": [tag.replace("-", "-X") for tag in row["noisy_ner_tags"]]} for row in ROWS]
    file = with_types(tmp_path / "train.jsonl", rows)
    settings = {"train_tags_column": "noisy_ner_tags", "num_meta_examples": 1}
    with pytest.raises(ValueError, match=r"column 'noisy_ner_tags' to train on \(XDATE, XLOC, XPER\)"):
        load_noisy_ner_data(NoisyNerArguments(train_file=file, **settings), seed=0)
    partly = with_types(tmp_path / "train.jsonl", rows, XPER="PER")
    load_noisy_ner_data(NoisyNerArguments(train_file=partly, **settings), seed=0)
    (record,) = caplog.records
    assert "train.jsonl has entities of type LOC, of which" in record.message


def test_a_subset_that_a_folder_does_not_have_is_refused_with_the_way_out(file, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = Path(file).parent
    settings = {"data": str(folder), "validation_split": None, "test_split": None, "num_meta_examples": 1}
    with pytest.raises(
        ValueError, match=r"has no subset 'en': .*default.* For a folder without subsets.*`--subset none`"
    ):
        load_noisy_ner_data(NoisyNerArguments(**settings, subset="en"), seed=0)
    assert len(load_noisy_ner_data(NoisyNerArguments(**settings), seed=0).train) == len(ROWS) - 1


def test_a_set_without_sentences_is_refused(generated, tmp_path):
    empty = tmp_path / "empty.parquet"
    Dataset.from_dict({"tokens": [["a"]], "ner_tags": [["O"]]}).select([]).to_parquet(empty)
    with pytest.raises(ValueError, match=r"empty\.parquet holds no sentence"):
        build(generated(meta_file=str(empty)))


@pytest.mark.real_data
def test_the_real_noise_of_hausa_is_in_the_tags_to_train_on(data_dir):
    arguments = NoisyNerArguments(
        data_dir=str(data_dir),
        train_file="ner/noisyner_hau_train.parquet", test_file="ner/noisyner_hau_test.parquet",
        train_tags_column="noisy_ner_tags", exclude_column="dup", num_meta_examples=100, max_length=96,
    )  # fmt: skip
    task = build(arguments)
    assert (len(task.train_dataset), len(task.meta_dataset), len(task.test_dataset)) == (903, 100, 291)
    assert 0.05 < sum(task.training_labels["is_corrupted"]) / len(task.training_labels) < 0.12

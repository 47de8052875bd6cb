import csv
from pathlib import Path

import numpy as np
import pandas
import pytest
from datasets import ClassLabel, Dataset, Value
from pictures import picture, png

from meta_trainer.tasks.image_classification import ImageClassificationArguments
from meta_trainer.tasks.image_classification.images import join_images, read_images
from meta_trainer.tasks.image_classification.loading import load_image_data
from meta_trainer.tasks.pictures import decode


def shown(rows: Dataset) -> list[list[list[int]]]:
    return [np.asarray(decode(stored, "an image")).tolist() for stored in rows["pixel_values"]]


@pytest.mark.parametrize("kind", ["uniform", "flip"])
def test_noise_is_in_the_training_labels_alone_and_is_recorded(small, kind):
    data = load_image_data(small(label_noise=kind, label_noise_share=0.5), seed=1)
    record = data.train_record.to_list()
    assert [row["trusted_label"] for row in record] == [row["row"] % 2 for row in record]
    assert [row["is_corrupted"] for row in record] == [row["label"] != row["trusted_label"] for row in record]
    assert sum(row["is_corrupted"] for row in record) == 16
    assert data.train["labels"][:] == [row["label"] for row in record]
    assert data.meta["labels"][:] == [row["row"] % 2 for row in data.meta_record.to_list()]
    assert data.test["labels"][:] == [i % 2 for i in range(100, 110)]
    assert data.classes == ["left", "right"]


def test_every_image_stays_with_its_label(small):
    data = load_image_data(small(), seed=1)
    for rows, record in ((data.train, data.train_record), (data.meta, data.meta_record)):
        assert shown(rows) == [picture(row).tolist() for row in record["row"]]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_meta_set_is_balanced_and_disjoint_from_the_training_images(small, seed):
    data = load_image_data(small(subset_seed=seed, max_train_examples=20), seed=seed)
    assert np.bincount(data.meta["labels"]).tolist() == [4, 4]
    assert len(data.train) == 20
    assert not set(data.meta_record["row"]) & set(data.train_record["row"])


def test_several_files_are_one_training_set(write_images):
    files = [write_images("a.parquet", range(6)), write_images("b.parquet", range(6, 12))]
    data = load_image_data(ImageClassificationArguments(train_file=files, num_meta_examples=2), seed=0)
    assert sorted([*data.train_record["row"], *data.meta_record["row"]]) == list(range(12))
    assert shown(data.train) == [picture(row).tolist() for row in data.train_record["row"]]


def test_real_noisy_labels_are_classes_of_the_trusted_column(write_images):
    file = write_images("train.parquet", range(12), noisy=[1] * 12, dup=[i < 2 for i in range(12)])
    arguments = ImageClassificationArguments(
        train_file=[file], test_file=file, train_label_column="noisy", exclude_column="dup", num_meta_examples=4
    )
    data = load_image_data(arguments, seed=0)
    assert data.classes == ["left", "right"]
    assert set(data.train["labels"]) == {1}
    assert sorted([*data.train_record["row"], *data.meta_record["row"]]) == list(range(2, 12))
    assert data.meta["labels"][:] == [row % 2 for row in data.meta_record["row"]]
    assert data.test["labels"][:] == [0, 1] * 6


def test_fewer_images_may_be_scored_drawn_from_all_of_them(small):
    few = load_image_data(small(max_test_examples=6), seed=1).test
    assert len(few) == 6
    assert shown(few) != shown(load_image_data(small(), seed=1).test)[:6]


def test_files_that_differ_in_storage_are_read_each_by_itself_and_classes_by_name(write_images, tmp_path):
    first = write_images("first.parquet", range(8))
    other = ClassLabel(names=["right", "left"])
    swapped = Dataset.from_parquet(write_images("swapped.parquet", range(8, 16))).rename_column("label", "stored")
    swapped = swapped.map(lambda row: {"label": ["left", "right"][row["stored"]]}, remove_columns="stored")
    swapped.cast_column("label", other).add_column("more", [1] * 8).to_parquet(tmp_path / "swapped.parquet")
    (tmp_path / "pictures").mkdir()
    for number in range(16, 24):
        (tmp_path / f"pictures/{number}.png").write_bytes(png(picture(number)))
    with (tmp_path / "table.csv").open("w") as file:
        rows = [(f"pictures/{i}.png", ["left", "right"][i % 2]) for i in range(16, 24)]
        csv.writer(file).writerows([("image", "label"), *rows])
    content = [{"bytes": png(picture(i)), "path": None} for i in range(24, 32)]
    pandas.DataFrame({"label": ["left", "right"] * 4, "image": content}).to_parquet(tmp_path / "plain.parquet")
    files = [first, "swapped.parquet", "table.csv", "plain.parquet"]
    arguments = ImageClassificationArguments(train_file=files, data_dir=str(tmp_path), num_meta_examples=2)
    data = load_image_data(arguments, seed=0)
    assert data.classes == ["left", "right"]
    for rows, record in ((data.train, data.train_record), (data.meta, data.meta_record)):
        assert shown(rows) == [picture(row).tolist() for row in record["row"]]
        assert rows["labels"][:] == [row % 2 for row in record["row"]]
    assert sorted([*data.train_record["row"], *data.meta_record["row"]]) == list(range(32))


def test_integers_of_different_width_are_the_same_labels(write_images, tmp_path):
    for name, numbers, kind in (("a", range(6), "int64"), ("b", range(6, 12), "int32")):
        rows = Dataset.from_parquet(write_images(f"{name}.parquet", numbers))
        rows.cast_column("label", Value(kind)).to_parquet(tmp_path / f"{name}.parquet")
    files = [str(tmp_path / f"{name}.parquet") for name in "ab"]
    data = load_image_data(ImageClassificationArguments(train_file=files, num_meta_examples=2), seed=0)
    assert (data.classes, len(data.train)) == (["0", "1"], 10)


def test_numbers_in_one_file_and_names_in_another_are_refused(write_images, tmp_path):
    named, numbered = write_images("named.parquet", range(6)), write_images("numbered.parquet", range(6, 12))
    Dataset.from_parquet(numbered).cast_column("label", Value("int64")).to_parquet(numbered)
    message = r"Labels of .*numbered\.parquet are numbers \('0, 1'\), and those of .*named\.parquet are names"
    with pytest.raises(ValueError, match=message):
        load_image_data(ImageClassificationArguments(train_file=[named, numbered], num_meta_examples=2), seed=0)


def test_an_error_names_the_file_and_the_row_in_it(write_images):
    first, second = (write_images(f"{name}.parquet", range(6)) for name in "ab")
    rows = Dataset.from_parquet(second).to_list()
    rows[4]["label"] = None
    Dataset.from_list(rows).to_parquet(second)
    with pytest.raises(ValueError, match=r"b\.parquet, row 5, column 'label': expected a label"):
        load_image_data(ImageClassificationArguments(train_file=[first, second], num_meta_examples=2), seed=0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_trusted_labels_in_some_files_and_none_in_others_are_refused(write_images, order):
    files = [write_images(f"{name}.parquet", range(6), crowd=[i % 2 for i in range(6)]) for name in ("full", "empty")]
    rows = Dataset.from_parquet(files[1])
    rows.remove_columns("label").add_column("label", [None] * 6).to_parquet(files[1])
    checked = write_images("checked.parquet", range(6))
    arguments = ImageClassificationArguments(
        train_file=[files[i] for i in order], train_label_column="crowd", meta_file=checked
    )
    message = r"label_column='label' holds labels in .*full\.parquet, but none in .*empty\.parquet: .* Fill the column"
    with pytest.raises(ValueError, match=message):
        load_image_data(arguments, seed=0)


@pytest.mark.parametrize("by_environment", [False, True])
def test_relative_paths_of_all_sets_start_from_the_data_folder(tmp_path, monkeypatch, by_environment):
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png(picture(number)))
    for kind in ("train", "validation", "test", "meta"):
        # One of them by its whole path.
        rows = [f"{tmp_path if i == 3 else Path()}/{i}.png,{i % 2}" for i in range(12)]
        (tmp_path / f"{kind}.csv").write_text("\n".join(["image,label", *(row.removeprefix("./") for row in rows)]))
    monkeypatch.chdir("/")
    if by_environment:
        monkeypatch.setenv("META_TRAINER_DATA", str(tmp_path))
    arguments = ImageClassificationArguments(
        train_file=["train.csv"], validation_file="validation.csv", test_file="test.csv", meta_file="meta.csv",
        data_dir=None if by_environment else str(tmp_path),
    )  # fmt: skip
    data = load_image_data(arguments, seed=0)
    for rows in (data.validation, data.test, data.meta):
        assert shown(rows) == [picture(number).tolist() for number in range(12)]
    assert shown(data.train) == [picture(row).tolist() for row in data.train_record["row"]]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_first_image_is_that_of_the_file_whichever_are_drawn(small, write_images, seed):
    files = [write_images("a.parquet", range(20), dup=[i < 2 for i in range(20)]), write_images("b.parquet", range(9))]
    Dataset.from_parquet(files[1]).add_column("dup", [False] * 9).to_parquet(files[1])
    settings = {"train_file": files, "exclude_column": "dup", "subset_seed": seed, "max_train_examples": 4}
    data = load_image_data(small(**settings), seed=0)
    assert np.asarray(decode(data.first_image, "an image")).tolist() == picture(2).tolist()


def read(rows: Dataset, name: str = "set", column: str = "image"):
    return read_images(rows, name, Path, column, "label")


def test_a_column_may_have_the_name_that_models_give_it():
    rows = Dataset.from_list([{"pixel_values": {"bytes": png(picture(1)), "path": None}, "label": 0}])
    assert read(rows, column="pixel_values").images.column_names == ["pixel_values"]


def test_a_row_without_an_image_is_named():
    content = {"bytes": png(picture(0)), "path": None}
    rows = Dataset.from_list([{"image": content, "label": 0}, {"image": None, "label": 1}])
    with pytest.raises(ValueError, match="set, row 2: expected an image in 'image', got None"):
        read(rows)


@pytest.mark.parametrize("value", [3, 0.5])
def test_a_column_of_something_else_is_refused(value):
    rows = Dataset.from_list([{"image": value, "label": i} for i in range(2)])
    with pytest.raises(ValueError, match=r"set: expected images in 'image' .* Name their column with image_column"):
        read(rows)


def test_a_missing_column_is_refused(small):
    with pytest.raises(ValueError, match=r"has no column 'img'; its columns are image, label"):
        load_image_data(small(image_column="img"), seed=0)


def test_one_file_is_not_copied(write_images):
    images = read(Dataset.from_parquet(write_images("a.parquet", range(4))))
    assert join_images([images]) is images


@pytest.mark.real_data
def test_cifar_with_human_labels_is_loaded(data_dir):
    arguments = ImageClassificationArguments(
        data_dir=str(data_dir),
        train_file=["images/cifar10_train-0.parquet", "images/cifar10_train-1.parquet"],
        test_file="images/cifar10_test.parquet",
        train_label_column="noisy_worst",
        num_meta_examples=1000,
    )
    data = load_image_data(arguments, seed=1)
    assert (len(data.train), len(data.meta), len(data.test)) == (49000, 1000, 10000)
    assert data.classes[0] == "airplane"
    assert np.mean(data.train_record["is_corrupted"]) == pytest.approx(0.402, abs=0.005)
    assert not any(data.meta_record["is_corrupted"])

import numpy as np
import pytest
from datasets import Dataset
from pictures import picture

from meta_trainer.tasks.image_classification import ImageClassificationArguments
from meta_trainer.tasks.image_classification.images import decode, read_images
from meta_trainer.tasks.image_classification.loading import load_image_data


def shown(rows: Dataset) -> list[list[list[int]]]:
    return [np.asarray(decode(stored)).tolist() for stored in rows["pixel_values"]]


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


def test_a_row_without_an_image_is_named():
    rows = Dataset.from_list([{"image": {"bytes": b"x", "path": None}, "label": 0}, {"image": None, "label": 1}])
    with pytest.raises(ValueError, match="set, row 2: expected an image in 'image', got None"):
        read_images([(rows, "set")], "image", "label")


@pytest.mark.parametrize("value", [3, 0.5])
def test_a_column_of_something_else_is_refused(value):
    rows = Dataset.from_list([{"image": value, "label": i} for i in range(2)])
    with pytest.raises(ValueError, match=r"set: expected images in 'image' .* Name their column with image_column"):
        read_images([(rows, "set")], "image", "label")


def test_a_missing_column_and_files_of_different_columns_are_refused(small):
    with pytest.raises(ValueError, match=r"has no column 'img'; its columns are image, label"):
        load_image_data(small(image_column="img"), seed=0)
    parts = [
        (Dataset.from_list([{"image": "a.png", "label": label}]), name) for label, name in ((1, "one"), ("x", "two"))
    ]
    with pytest.raises(ValueError, match="one, two should have the same columns"):
        read_images(parts, "image", "label")


@pytest.mark.parametrize("stored", [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "nowhere.png"}])
def test_a_file_that_is_no_image_is_one_clear_error(stored):
    with pytest.raises(ValueError, match="An image of the data cannot be read"):
        decode(stored)


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

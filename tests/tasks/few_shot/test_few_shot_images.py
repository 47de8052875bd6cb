"""Domains: decoded once, at one size and with three channels."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from meta_trainer.tasks.few_shot.images import load_domain


def test_images_are_scaled_to_three_channels_and_sorted_by_class(arguments, write_domain):
    grey = write_domain("grey", classes=3, per_class=4, channels=1)
    domain = load_domain(arguments(domains=["a=x/y", "b=x/z", f"infrared={grey}"]), "infrared")
    assert domain.images.shape == (12, 3, 8, 8)
    assert domain.images.dtype == np.uint8
    assert (domain.images[:, 0] == domain.images[:, 2]).all()
    means = [domain.images[rows].mean() for rows in domain.rows]
    assert [len(rows) for rows in domain.rows] == [4, 4, 4]
    assert np.allclose(means, [20, 86, 153], atol=5)


def test_pixels_of_the_right_size_stay_as_they_are(arguments, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    rows = [{"image": image, "label": name} for image, name in zip(pixels, "ab", strict=True)]
    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    domain = load_domain(arguments(domains=["a=x", "b=y", f"infrared={tmp_path / 'x.parquet'}"]), "infrared")
    assert (domain.images == pixels.transpose(0, 3, 1, 2)).all()


def test_the_first_images_of_each_class_are_kept(arguments):
    everything, part = (load_domain(arguments(max_images_per_class=n), "red") for n in (None, 2))
    assert part.images.shape[0] == 8
    for whole_rows, rows in zip(everything.rows, part.rows, strict=True):
        assert (everything.images[whole_rows[:2]] == part.images[rows]).all()


def test_a_local_folder_is_read_like_a_data_set_of_the_hub(arguments, write_domain, tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    (tmp_path / "bird.parquet").touch()
    from_file = load_domain(arguments(), "red")
    (folder / "train-00000.parquet").write_bytes((tmp_path / "red.parquet").read_bytes())
    from_folder = load_domain(arguments(domains=["a=x", "b=y", f"infrared={folder}"]), "infrared")
    assert (from_folder.images == from_file.images).all()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"image": ["text", "no image"], "label": [0, 1]}, "the column 'image' should hold images"),
        ({"image": [1, 2], "label": [0, 1]}, "the column 'image' should hold images"),
        ({"image": [{"bytes": b"x", "path": None}] * 2, "label": [0, 1]}, "the column 'image' should hold images"),
        ({"image": [{"bytes": b"x", "path": None}] * 2, "label": [0, None]}, "every image needs a label"),
        ({"picture": [0], "label": [0]}, "has no column 'image'; its columns are picture, label"),
    ],
)
def test_rows_that_are_no_images_with_labels_are_refused(arguments, tmp_path, column, message):
    path = tmp_path / "bad.parquet"
    Dataset.from_dict(column).to_parquet(str(path))
    with pytest.raises(ValueError, match=message):
        load_domain(arguments(domains=["a=x", "b=y", f"infrared={path}"]), "infrared")

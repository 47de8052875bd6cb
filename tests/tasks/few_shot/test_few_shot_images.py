"""Domains: decoded once, at one size and with three channels."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage

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


def test_relative_paths_start_from_the_data_folder_and_pictures_are_read_as_for_other_tasks(
    arguments, tmp_path, monkeypatch
):
    grey = np.random.default_rng(0).integers(0, 256, (4, 8, 8)).astype(np.uint8)
    folder = tmp_path / "data"
    folder.mkdir()
    for number, shades in enumerate(grey):
        # Of 16 bits, and of a transparent ground that is black below.
        wide = PillowImage.fromarray(shades.astype(np.uint16) * 257)
        clear = PillowImage.new("LA", (8, 8))
        clear.putalpha(PillowImage.fromarray(255 - shades))
        (wide if number % 2 else clear).save(folder / f"{number}.png")
    rows = Dataset.from_dict({"image": [f"{number}.png" for number in range(4)], "label": [0, 0, 1, 1]})
    rows.to_parquet(str(folder / "x.parquet"))
    monkeypatch.chdir("/")
    domain = load_domain(arguments(domains=["a=x", "b=y", "infrared=x.parquet"], data_dir=str(folder)), "infrared")
    assert np.abs(domain.images.astype(int) - grey[:, None]).max() <= 1
    rows.to_csv(str(folder / "x.csv"))
    of_csv = load_domain(arguments(domains=["a=x", "b=y", "infrared=x.csv"], data_dir=str(folder)), "infrared")
    assert (of_csv.images == domain.images).all()


def content(length: int | None = None) -> dict[str, object]:
    file = io.BytesIO()
    PillowImage.effect_noise((32, 32), 50).save(file, "PNG")
    return {"bytes": file.getvalue()[:length], "path": None}


IMAGE, TRUNCATED = content(), content(400)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"image": ["text", "no image"], "label": [0, 1]}, "row 1: there is no file .*text; relative paths start"),
        ({"image": [1, 2], "label": [0, 1]}, "expected images in 'image'"),
        ({"image": [IMAGE, {"bytes": b"x", "path": None}], "label": [1, 0]}, "row 2: an image cannot be read"),
        ({"image": [IMAGE, TRUNCATED], "label": [1, 0]}, "row 2: an image cannot be read: .*truncated"),
        ({"image": [IMAGE, None], "label": [1, 0]}, "row 2: expected an image in 'image', got None"),
        ({"image": [IMAGE] * 2, "label": [0, None]}, "row 2, column 'label': expected a label as text or integer"),
        ({"image": [IMAGE] * 2, "label": [[0], [1, 2]]}, r"row 1, column 'label': expected a label .* got \[0\]"),
        ({"image": [IMAGE] * 2, "label": [["a"], ["b"]]}, r"row 1, column 'label': expected a label .* got \['a'\]"),
        ({"image": [IMAGE] * 2, "label": [0.5, 1.0]}, "row 1, column 'label': expected a label .* got 0.5"),
        ({"picture": [0], "label": [0]}, "has no column 'image'; its columns are picture, label"),
    ],
)
def test_rows_that_are_no_images_with_labels_are_refused(arguments, tmp_path, column, message):
    path = tmp_path / "bad.parquet"
    Dataset.from_dict(column).to_parquet(str(path))
    with pytest.raises(ValueError, match=rf"bad\.parquet.*{message}"):
        load_domain(arguments(domains=["a=x", "b=y", f"infrared={path}"]), "infrared")

"""Images of all kinds, and what is none, before they are trained on."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, load_from_disk
from numpy.testing import assert_array_equal
from pictures import picture, png
from PIL import Image as PillowImage

from meta_trainer.tasks.image_classification.pixels import ProcessedPixels, ResizedPixels
from meta_trainer.tasks.pictures import decode, read_picture, stored_images

GLYPH = np.array([[0, 0, 255], [0, 255, 255], [255, 0, 255]], dtype=np.uint8)
"""A black drawing on white."""


def saved(image: PillowImage.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def transparent(mode: str) -> dict[str, Any]:
    """The drawing, black on transparent black."""
    if mode == "RGB":
        # One colour is transparent; the drawing has another that is as good as black.
        drawing = np.where(GLYPH[..., None] == 0, np.uint8([0, 0, 1]), np.uint8([0, 0, 0]))
        return saved(PillowImage.fromarray(drawing), transparency=(0, 0, 0))
    if mode == "L":
        return saved(PillowImage.fromarray(np.where(GLYPH == 0, 0, 7).astype(np.uint8)), transparency=7)
    if mode == "P":
        image = PillowImage.fromarray((GLYPH == 0).astype(np.uint8)).convert("P")
        image.putpalette([0] * 6)
        return saved(image, transparency=0)
    black = PillowImage.new(mode, (3, 3))
    black.putalpha(PillowImage.fromarray(255 - GLYPH))
    return saved(black)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_becomes_white(mode):
    stored = transparent(mode)
    assert decode(stored, "an image").mode == mode
    assert_array_equal(np.asarray(read_picture(stored, "L")), GLYPH)
    found = np.asarray(read_picture(stored, "RGB"))
    assert np.abs(found.astype(int) - GLYPH[..., None]).max() <= 1
    shades = ResizedPixels(3, 1, [0.0], [1.0])([stored])[0, 0] * 255
    assert_array_equal(shades.round().numpy().astype(np.uint8), GLYPH)


def test_half_transparent_is_half_white_and_opaque_colours_stay():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4)).astype(np.uint8)
    pixels[:2, :, 3] = 255
    pixels[3, 3] = [0, 100, 200, 51]
    found = np.asarray(read_picture(saved(PillowImage.fromarray(pixels)), "RGB"))
    assert (found[:2] == pixels[:2, :, :3]).all()
    assert_array_equal(found[3, 3], np.array([204, 224, 244], dtype=np.uint8))


@pytest.mark.parametrize("kind", ["png", "little-endian", "big-endian", "32 bits"])
def test_shades_of_16_bits_are_scaled_to_8(kind):
    shades = np.random.default_rng(0).integers(0, 65536, (5, 5))
    images = {
        "png": lambda: saved(PillowImage.fromarray(shades.astype(np.uint16))),
        "little-endian": lambda: saved(PillowImage.fromarray(shades.astype(np.uint16)), "TIFF"),
        "big-endian": lambda: saved(PillowImage.frombytes("I;16B", (5, 5), shades.astype(">u2").tobytes()), "TIFF"),
        "32 bits": lambda: saved(PillowImage.fromarray(shades.astype(np.int32)), "TIFF"),
    }
    stored = images[kind]()
    assert decode(stored, "an image").mode.startswith("I")
    expected = np.round(shades / 65535 * 255).astype(np.uint8)
    assert_array_equal(np.asarray(read_picture(stored, "L")), expected)
    assert_array_equal(np.asarray(read_picture(stored, "RGB")), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.filterwarnings("ignore:Downcasting array dtype")
def test_arrays_of_integers_that_fit_in_8_bits_stay_as_they_are():
    shades = np.random.default_rng(0).integers(0, 256, (6, 6))
    rows = Dataset.from_list([{"image": shades.tolist()}])
    (stored,) = stored_images(rows, "set", "image", [0], Path)["image"]
    assert decode(stored, "an image").mode == "I"
    assert_array_equal(np.asarray(read_picture(stored, "L")), shades.astype(np.uint8))


def test_integers_beyond_16_bits_are_refused():
    stored = saved(PillowImage.fromarray(np.array([[-1, 70000]], dtype=np.int32)), "TIFF")
    with pytest.raises(ValueError, match=r"set, row 1: expected shades of grey from 0 to 65535, got .* -1 to 70000"):
        read_picture(stored, "L", "set, row 1")


def test_floating_point_images_are_refused_by_their_row():
    number = saved(PillowImage.fromarray(np.random.default_rng(0).random((4, 4)).astype(np.float32)), "TIFF")
    rows = Dataset.from_list([{"image": saved(PillowImage.fromarray(GLYPH))}, {"image": number}])
    with pytest.raises(ValueError, match="set, row 2: expected an image of 8 or 16 bits, got floating-point numbers"):
        stored_images(rows, "set", "image", [0, 1], Path)
    with pytest.raises(ValueError, match="The data: expected an image of 8 or 16 bits"):
        read_picture(number, "L")


def test_pretrained_models_read_the_same_pictures():
    def processor(images: list[PillowImage.Image], return_tensors: str) -> dict[str, Any]:
        return {"pixel_values": [np.asarray(image) for image in images]}

    (found,) = ProcessedPixels(processor)([transparent("RGBA")])
    assert_array_equal(found[..., 0], GLYPH)


@pytest.mark.parametrize("row", [2, 5])
@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"bytes": b"no image", "path": None}, "an image cannot be read: it is nothing that Pillow knows"),
        ({"bytes": b"", "path": "a.png"}, "an image cannot be read: it is nothing that Pillow knows"),
        ({"bytes": None, "path": "/nowhere/x.png"}, "there is no file /nowhere/x.png; relative paths start from"),
        ({"bytes": None, "path": "file:///x.png"}, "there is no file .*; relative paths start from data_dir"),
        ({"bytes": None, "path": "iVBOR" * 80}, "there is no file .{300}; relative paths"),
        ({"bytes": None, "path": __file__}, r"\(.*test_image_pictures.py\): an image cannot be read: it is nothing"),
        ({"bytes": None, "path": None}, "expected an image in 'image', got None"),
    ],
)
def test_a_row_whose_image_cannot_be_opened_is_named(stored, message, row):
    images: list[Any] = [{"bytes": png(picture(i)), "path": None} for i in range(6)]
    images[row] = stored
    rows = Dataset.from_dict({"image": images})
    with pytest.raises(ValueError, match=rf"set, row {row + 1}.*{message}"):
        stored_images(rows, "set", "image", range(6), Path)
    left = [i for i in range(6) if i != row]
    assert len(stored_images(rows, "set", "image", left, Path)) == 6


def test_content_and_addresses_stay_as_they_are():
    content = {"bytes": png(picture(0)), "path": "name.png"}
    address = {"bytes": None, "path": "https://example.org/x.png"}
    rows = Dataset.from_dict({"image": [content, address]}, features=Features({"image": Image()}))
    found = stored_images(rows, "set", "image", [0, 1], lambda path: Path("/data") / path)
    assert found["image"][:] == [content, address]


def test_content_on_a_disk_is_not_copied_into_memory(tmp_path):
    rows = [{"image": {"bytes": png(picture(0)), "path": "name.png"}}]
    Dataset.from_list(rows, features=Features({"image": Image()})).save_to_disk(tmp_path)
    assert stored_images(load_from_disk(tmp_path), "set", "image", [0], Path).cache_files


def test_files_and_content_may_be_mixed(tmp_path):
    (tmp_path / "x.png").write_bytes(png(picture(1)))
    rows = Dataset.from_list([{"image": {"bytes": png(picture(0)), "path": "x.png"}},
                              {"image": {"bytes": None, "path": "x.png"}}])  # fmt: skip
    found = stored_images(rows, "set", "image", [0, 1], lambda path: tmp_path / path)
    assert [np.asarray(read_picture(stored, "L")).tolist() for stored in found["image"]] == [
        picture(0).tolist(), picture(1).tolist()
    ]  # fmt: skip


@pytest.mark.parametrize("path", [None, "x.png"])
def test_a_truncated_image_is_one_clear_error_when_it_is_read(path):
    rows = Dataset.from_list([{"image": {"bytes": png(picture(0, size=64))[:400], "path": path}}])
    (stored,) = stored_images(rows, "set", "image", [0], Path)["image"]
    with pytest.raises(ValueError, match=f"^{path or 'The data'}: an image cannot be read: .*truncated"):
        read_picture(stored, "L")

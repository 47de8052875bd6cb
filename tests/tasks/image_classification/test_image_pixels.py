import math

import numpy as np
import pytest
import torch
from pictures import picture, png
from torch.testing import assert_close

from meta_trainer.modules.input_rotation import rotate
from meta_trainer.tasks.image_classification.pixels import ImageTransform, ResizedPixels, augment


def stored(number: int, channels: int = 1) -> dict[str, object]:
    return {"bytes": png(picture(number, channels=channels)), "path": None}


@pytest.mark.parametrize("size", [16, 40])
def test_pixels_are_scaled_and_normalised_by_channel(size):
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    pixels = picture(1, channels=3, size=size)
    found = ResizedPixels(size, 3, mean, std)([{"bytes": png(pixels), "path": None}])
    expected = (pixels / 255 - np.array(mean)) / np.array(std)
    assert_close(found, torch.tensor(expected).permute(2, 0, 1)[None].float())


def test_images_are_brought_to_one_size_and_to_one_kind():
    read = ResizedPixels(8, 1, [0.0], [1.0])
    assert read([stored(0), stored(1, channels=3)]).shape == (2, 1, 8, 8)
    assert ResizedPixels(8, 3, [0.0], [1.0])([stored(0)]).shape == (1, 3, 8, 8)


def test_a_set_is_turned_by_its_angle_and_keeps_its_labels():
    read = ResizedPixels(16, 1, [0.3], [0.2])
    rows = {"pixel_values": [stored(0), stored(1)], "labels": [0, 1]}
    turned = ImageTransform(read, degrees=30)(rows)
    assert_close(turned["pixel_values"], rotate(read(rows["pixel_values"]), torch.tensor(math.radians(30))))
    assert turned["labels"] == [0, 1]
    assert ImageTransform(read)({"labels": [1]}) == {"labels": [1]}


def test_a_shifted_image_is_a_window_of_the_image_mirrored_at_its_edges():
    pixels = torch.randn(6, 2, 8, 8)
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    shifts = set()
    for number, moved in enumerate(augment(pixels, crop_padding=2, flip=False).numpy()):
        matching = [
            (i, j) for i in range(5) for j in range(5) if np.array_equal(padded[number, :, i : i + 8, j : j + 8], moved)
        ]
        assert len(matching) == 1
        shifts.update(matching)
    assert len(shifts) > 1


def test_about_half_the_images_are_turned_left_to_right():
    pixels = torch.randn(200, 1, 4, 4)
    flipped = [torch.equal(new, old.flip(2)) for new, old in zip(augment(pixels, 0, flip=True), pixels, strict=True)]
    assert 70 < sum(flipped) < 130
    assert all(
        turned or torch.equal(new, old)
        for turned, new, old in zip(flipped, augment(pixels, 0, flip=True), pixels, strict=True)
    )


def test_what_is_drawn_depends_on_the_batch_and_its_order_alone():
    pixels = torch.randn(8, 1, 8, 8)
    state = torch.get_rng_state()
    first, again = (augment(pixels, 3, flip=True) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment(pixels.flip(0), 3, flip=True).flip(0), first)

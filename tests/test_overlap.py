"""Examples that a train batch and a meta batch have in common."""

import pytest
import torch

from meta_trainer import overlap as overlap_module
from meta_trainer.overlap import overlap


def tokens(rows, length, padding=0):
    ids = torch.full((len(rows), length), padding)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def share(train, meta):
    found = overlap(train, meta, "input_ids")
    return None if found is None else float(found)


@pytest.mark.parametrize("padding", [0, 1])
def test_equal_rows_are_found_whatever_their_padding(padding):
    train = tokens([[5, 6, 7], [0, 2], [9]], 3, padding)
    meta = tokens([[9], [0, 2], [7, 6, 5], [5, 6]], 8, padding)
    assert share(train, meta) == 0.5


def test_rows_differ_by_order_by_repetition_and_by_a_token_of_number_zero():
    rows = [[1, 2, 3], [3, 2, 1], [1, 1, 2, 3], [0], [0, 0], [1, 2, 3, 0]]
    for number, row in enumerate(rows):
        others = rows[:number] + rows[number + 1 :]
        assert share(tokens(others, 4), tokens([row], 4)) == 0
        assert share(tokens(rows, 4), tokens([row], 5)) == 1


def test_ten_thousand_random_rows_have_no_accidental_twins():
    generator = torch.Generator().manual_seed(0)
    rows = torch.unique(torch.randint(50, (4000, 4), generator=generator), dim=0)
    half = len(rows) // 2
    assert share({"input_ids": rows[:half]}, {"input_ids": rows[half:]}) == 0


def test_examples_that_are_trained_on_as_trusted_ones_are_there_on_purpose():
    rows = tokens([[5, 6, 7], [0, 2], [9]], 3)
    train = rows | {"is_trusted": torch.tensor([True, False, False])}
    assert share(train, rows) == pytest.approx(2 / 3)
    assert share(rows | {"is_trusted": torch.ones(3)}, rows) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_are_compared_bit_by_bit(dtype):
    images = torch.rand(4, 3, 5, 5).to(dtype)
    near = images[:1].clone()
    near[0, 0, 0, 0] = 2.0
    train, meta = {"pixel_values": images}, {"pixel_values": torch.cat([near, images[2:]])}
    assert float(overlap(train, meta, "pixel_values")) == pytest.approx(2 / 3)


def test_labels_do_not_count():
    train = {**tokens([[5, 6]], 2), "labels": torch.tensor([0])}
    assert share(train, {**tokens([[5, 6]], 2), "labels": torch.tensor([1])}) == 1


@pytest.mark.parametrize("batch", [{}, {"input_ids": [[1, 2]]}, {"input_ids": torch.tensor(3)}])
def test_a_batch_without_the_column_has_no_answer(batch):
    assert share(tokens([[1]], 1), batch) is None
    assert share(batch, tokens([[1]], 1)) is None


def test_what_is_mixed_block_by_block_is_the_same(monkeypatch):
    images = torch.rand(3, 3, 7, 7)
    whole = overlap_module._fingerprints({"pixel_values": images}, "pixel_values")
    monkeypatch.setattr(overlap_module, "_BLOCK", 50)
    assert torch.equal(overlap_module._fingerprints({"pixel_values": images}, "pixel_values"), whole)
    padded = tokens([[5, 6, 7], [0, 2], [9]], 40)
    monkeypatch.setattr(overlap_module, "_BLOCK", 6)
    assert share(padded, tokens([[9], [5, 6]], 4)) == 0.5

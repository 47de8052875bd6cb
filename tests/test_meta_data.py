"""The stream of meta batches."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import IterableDataset, default_collate

from meta_trainer.meta_data import MetaBatchSampler, MetaDataStream


def batches(count, num_examples=10, batch_size=4, seed=0, **settings):
    return list(islice(MetaBatchSampler(num_examples, batch_size, seed, **settings), count))


def stream(num_examples=10, batch_size=4, seed=0, **settings):
    return MetaDataStream(list(range(num_examples)), batch_size, list, seed, **settings)


def take(source, count):
    return [next(source) for _ in range(count)]


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 4), (10, 5), (3, 7), (1, 3), (8, 1)])
def test_every_pass_covers_the_set_and_every_batch_is_full(num_examples, batch_size):
    found = batches(3 * num_examples, num_examples, batch_size)

    assert {len(batch) for batch in found} == {batch_size}
    laid_out = [index for batch in found for index in batch]
    for start in range(0, len(laid_out), num_examples):
        assert sorted(laid_out[start : start + num_examples]) == list(range(num_examples))


def test_passes_are_shuffled_each_in_its_own_way():
    laid_out = [index for batch in batches(4, num_examples=20, batch_size=10) for index in batch]
    first, second = laid_out[:20], laid_out[20:]

    assert first != sorted(first)
    assert first != second


@pytest.mark.parametrize("start", [1, 2, 3, 17])
def test_the_nth_batch_is_a_function_of_the_seed_and_n(start):
    assert batches(5, start=start) == batches(start + 5)[start:]
    assert batches(5, seed=0) == batches(5, seed=0)
    assert batches(5, seed=0) != batches(5, seed=1)


def test_an_iterator_that_starts_anew_gives_the_same_batches():
    sampler = MetaBatchSampler(10, 4, seed=3)
    assert list(islice(sampler, 6)) == list(islice(sampler, 6))


@pytest.mark.parametrize(("num_examples", "batch_size", "world_size"), [(12, 2, 3), (10, 2, 2), (5, 4, 2)])
def test_the_batches_of_all_replicas_make_up_the_global_batch(num_examples, batch_size, world_size):
    whole = batches(9, num_examples, batch_size * world_size)
    parts = [batches(9, num_examples, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]

    assert [[index for part in step for index in part] for step in zip(*parts, strict=True)] == whole


def test_the_batches_of_replicas_are_disjoint_within_a_pass():
    left, right = (batches(3, 12, 2, rank=rank, world_size=2) for rank in range(2))
    assert all(not set(a) & set(b) for a, b in zip(left, right, strict=True))


def test_the_stream_collates_what_the_sampler_picks():
    examples = [{"x": torch.tensor([float(i)]), "labels": i} for i in range(10)]
    found = take(MetaDataStream(examples, 4, default_collate, seed=0), 3)

    assert [batch["labels"].tolist() for batch in found] == batches(3)
    assert [batch["x"].flatten().tolist() for batch in found] == [[float(i) for i in b] for b in batches(3)]


def test_a_hugging_face_data_set_will_do():
    dataset = HuggingFaceDataset.from_dict({"labels": list(range(10))})
    found = take(MetaDataStream(dataset, 4, default_collate, seed=0), 3)
    assert [batch["labels"].tolist() for batch in found] == batches(3)


@pytest.mark.parametrize("read", [0, 1, 3, 11])
def test_seeking_equals_having_read(read):
    reader, seeker = stream(), stream()
    take(reader, read)
    seeker.seek(read)

    assert seeker.batches_read == reader.batches_read == read
    assert take(seeker, 4) == take(reader, 4)
    assert seeker.batches_read == read + 4


def test_seeking_goes_back_as_well():
    source = stream()
    first = take(source, 5)
    source.seek(2)
    assert take(source, 3) == first[2:]


def test_reading_draws_nothing_from_the_global_random_state():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(2).tolist()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)

    source = stream(num_examples=3)
    take(source, 7)
    source.seek(2)
    take(source, 2)

    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


def test_the_order_does_not_depend_on_the_global_random_state():
    torch.manual_seed(1), np.random.seed(1)
    first = take(stream(), 5)
    torch.manual_seed(2), np.random.seed(2)
    assert take(stream(), 5) == first


def test_an_iterable_data_set_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(int, 1)

    with pytest.raises(ValueError, match="map-style data set with a length, got Endless"):
        MetaDataStream(Endless(), 4, list, seed=0)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="at least one example, got none"):
        MetaDataStream([], 4, list, seed=0)

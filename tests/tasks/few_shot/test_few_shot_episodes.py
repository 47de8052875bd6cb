"""Episodes: what is in them, and that all follows from the seed and their number."""

import numpy as np
import pytest
import torch

from meta_trainer.tasks.few_shot.episodes import Episode, EpisodeCollator
from meta_trainer.tasks.few_shot.images import load_domain


@pytest.fixture
def collator(arguments):
    def make(seed=1, carry_meta=True, **changes):
        settings = arguments(**changes)
        domains = {name: load_domain(settings, name) for name in settings.places}
        return EpisodeCollator(settings, domains, seed, carry_meta)

    return make


def places_of(collator, pixels):
    """Domain and class of each image."""
    found = []
    for image in pixels:
        raw = ((image + 1) * 127.5).round().byte().numpy()
        found += [
            (domain.name, number, row)
            for domain in (*collator.training, collator.held_out)
            for number, rows in enumerate(domain.rows)
            for row in rows
            if (domain.images[row] == raw).all()
        ]
    assert len(found) == len(pixels)
    return found


def test_an_episode_has_support_images_of_each_class_and_then_its_queries(collator):
    make = collator()
    batch = make([Episode(3)])
    assert batch["pixel_values"].shape == (1, 15, 3, 8, 8)
    assert batch["labels"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    places = places_of(make, batch["pixel_values"][0])
    assert len(set(places)) == 15  # no image is twice in an episode
    (domain,) = {name for name, _, _ in places}
    assert domain == make.domains_of(3)[0].name
    support, queries = [c for _, c, _ in places[:6]], [c for _, c, _ in places[6:]]
    assert support == [c for c in support[::2] for _ in range(2)]
    assert queries == [c for c in support[::2] for _ in range(3)]
    assert len(set(support)) == 3


def test_the_meta_batch_is_an_episode_of_the_other_domain_normalized_by_running_statistics(collator):
    make = collator()
    for number in range(0, 40, 5):
        batch = make([Episode(number)])
        meta = batch["meta_batch"]
        seen, unseen = make.domains_of(number)
        assert {name for name, _, _ in places_of(make, meta["pixel_values"][0])} == {unseen.name}
        assert seen.name != unseen.name
        assert meta["use_running_statistics"]
        assert set(meta) == {"pixel_values", "labels", "use_running_statistics"}


def test_domains_are_drawn_anew_for_every_epoch_and_the_held_out_one_is_tested_on(collator):
    make = collator()
    pairs = [tuple(domain.name for domain in make.domains_of(number)) for number in range(40)]
    assert all(len(set(pairs[start : start + 5])) == 1 for start in range(0, 40, 5))
    assert len(set(pairs)) > 2
    assert not any("infrared" in pair for pair in pairs)
    test = make([Episode(0, is_test=True), Episode(1, is_test=True)])
    assert {name for name, _, _ in places_of(make, test["pixel_values"].flatten(0, 1))} == {"infrared"}
    assert set(test) == {"pixel_values", "labels"}


def test_an_episode_follows_from_the_seed_and_its_number(collator):
    first, again, other = collator(), collator(), collator(seed=2)
    first([Episode(0)])
    batch, same, changed = (make([Episode(7)]) for make in (first, again, other))
    assert torch.equal(batch["pixel_values"], same["pixel_values"])
    assert torch.equal(batch["meta_batch"]["pixel_values"], same["meta_batch"]["pixel_values"])
    assert not torch.equal(batch["pixel_values"], changed["pixel_values"])
    assert not torch.equal(batch["pixel_values"], first([Episode(8)])["pixel_values"])


def test_without_a_meta_module_the_training_episodes_are_the_same(collator):
    batch, plain = collator()([Episode(4)]), collator(carry_meta=False)([Episode(4)])
    del batch["meta_batch"]
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[key], plain[key]) for key in batch)


def test_the_auxiliary_classes_are_those_of_all_training_domains(collator):
    make = collator()
    assert make.num_classes == 12
    for number in range(0, 40, 5):
        batch = make([Episode(number)])
        first = ["red", "green", "yellow"].index(make.domains_of(number)[0].name) * 4
        expected = [first + c for _, c, _ in places_of(make, batch["pixel_values"][0])]
        assert batch["class_ids"].tolist() == [expected]


def test_the_weight_of_the_auxiliary_loss_falls_as_in_the_official_code(collator):
    make = collator(auxiliary_weight=2.0)
    weights = [make.auxiliary_weight(number) for number in range(40)]
    assert np.allclose(weights, [2 * 0.9 ** (20 * number // 40) for number in range(40)])
    assert make([Episode(6)])["auxiliary_weight"].tolist() == [pytest.approx(2 * 0.9**3)]
    assert "class_ids" not in collator(auxiliary_weight=0.0)([Episode(6)])


def test_classes_with_too_few_images_are_left_out_and_too_few_of_them_are_refused(collator, arguments, write_domain):
    with pytest.raises(ValueError, match=r"'red' has 0 classes of at least 6 images .* an episode takes 3.* has 5\."):
        collator(num_queries=4)
    with pytest.raises(ValueError, match=r"has 4 classes of at least 5 images .* an episode takes 5"):
        collator(n_way=5)

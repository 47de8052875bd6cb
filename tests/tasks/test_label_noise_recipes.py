"""Recipes of Meta-Weight-Net on texts, images and named entities: what a folder's recipes have in common."""

import pytest
import yaml

from meta_trainer.recipe import recipes_folder

NETS = {"meta_weight_net_evograd", "meta_weight_net_t1t2", "meta_weight_net_best"}
OWN = {
    "description",
    "method",
    "hypergradient",
    "num_candidates",
    "sigma",
    "temperature",
    "noise",
    "meta_guard",
    "inner_step",
}


@pytest.mark.parametrize(
    ("folder", "nets", "own"),
    [
        ("text_classification", NETS, OWN),
        ("image_classification", NETS, OWN),
        ("noisy_ner", NETS | {"meta_weight_net_sentences"}, OWN | {"weight_net_level", "weight_net_reads_label"}),
    ],
)
def test_the_recipes_differ_only_in_what_is_meta_learned_or_trained_on(folder, nets, own):
    files = (recipes_folder() / folder).glob("*.yaml")
    contents = {file.stem: yaml.safe_load(file.read_text()) for file in files}
    assert set(contents) == {"plain", "plain_with_meta_set", "plain_on_meta_set", *nets}
    plain = contents.pop("plain")
    for other in contents.values():
        assert {key for key in plain if other.get(key) != plain[key]} == {"description", "method"}
    for stem, own_key in (("plain_with_meta_set", "train_on_meta"), ("plain_on_meta_set", "train_on_meta_alone")):
        baseline = contents.pop(stem)
        assert {key: baseline[key] for key in baseline.keys() - plain.keys()} == {own_key: True}
    first, *others = ({k: v for k, v in recipe.items() if k not in own} for recipe in contents.values())
    assert all(other == first for other in others)

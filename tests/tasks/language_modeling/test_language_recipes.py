"""Recipes of mixtures, from the file to the run folder."""

import json
from pathlib import Path

import pytest
import yaml

from meta_trainer import DomainWeights
from meta_trainer.cli import main
from meta_trainer.recipe import read_recipe, recipes_folder

FOLDER = recipes_folder() / "mixture"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
TINY = {
    "sources": ["news=generated:sport", "other=generated:science", "scrambled=generated:sport"],
    "corrupt_sources": ["scrambled=shuffle"],
    "max_source_examples": 40,
    "num_meta_examples": 30,
    "test_texts": "generated:sport@test",
    "max_eval_examples": 20,
    "block_length": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 400,
    "per_device_train_batch_size": 4,
    "per_device_meta_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


def tiny(folder: Path, name: str, **settings: object) -> str:
    """A recipe of the package on small generated data."""
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, **TINY, "output_dir": str(folder / "run"), **settings}))
    return str(file)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs(tmp_path, name):
    assert main(["train", "--config", tiny(tmp_path, name)]) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())["results"][0]
    assert result["steps"] == 2
    assert result["metrics"]["perplexity"] > 1
    assert 0 <= result["metrics"]["token_accuracy"] <= 1
    if name.startswith("domain_weights"):
        module = DomainWeights.from_pretrained(tmp_path / "run" / "meta_module")
        assert module.domains == ["news", "other", "scrambled"]
        logged = {key for key in result["history"][0] if key.startswith("meta_module/")}
        assert logged == {f"meta_module/weight_{domain}" for domain in module.domains}


def test_a_method_and_its_baseline_run_beside_each_other(tmp_path):
    file = tiny(tmp_path, "domain_weights_best", compare_with_baseline=True, train_on_meta=True)
    assert main(["train", "--config", file]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert [result["name"] for result in results] == ["plain training on both sets", "domain weights, guided EvoGrad"]


@pytest.mark.parametrize("module", ["domain_weights", "meta_weight_net"])
def test_no_meta_module_tells_trusted_texts_from_others(tmp_path, module):
    file = tiny(tmp_path, "domain_weights_best", meta_module=module, train_on_meta=True)
    with pytest.raises(ValueError, match=r"`train_on_meta` is for a baseline: a meta module .* Set it to false"):
        read_recipe(file, [])


def test_the_recipes_differ_only_in_what_is_meta_learned_or_trained_on():
    contents = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in NAMES}
    plain = contents.pop("plain")
    assert set(contents) == {
        "plain_with_meta_set", "plain_on_meta_set",
        "domain_weights_evograd", "domain_weights_t1t2", "domain_weights_best",
    }  # fmt: skip
    for other in contents.values():
        assert {key for key in plain if other.get(key) != plain[key]} == {"description", "method"}
    for name, key in (("plain_with_meta_set", "train_on_meta"), ("plain_on_meta_set", "train_on_meta_alone")):
        baseline = contents[name]
        assert {own: baseline[own] for own in baseline.keys() - plain.keys()} == {key: True}


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (
            "ner",
            {"source_data": "generated", "target_data": "generated"},
            "not for task='ner'. Choose among representation_transform",
        ),
        ("text_classification", {"data": "generated"}, "of which task='text_classification' has one here"),
        ("language_modeling", {"sources": ["a=generated"]}, "of which task='language_modeling' has one here"),
    ],
)
def test_weights_of_domains_need_several_domains(tmp_path, task, settings, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"task": task, **settings, "meta_module": "domain_weights", "use_cpu": True}))
    with pytest.raises(ValueError, match=message):
        read_recipe(str(file), [])


@pytest.mark.real_data
def test_the_weights_of_bad_sources_fall(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("META_TRAINER_DATA", str(data_dir))
    grid = yaml.safe_load((FOLDER / "grids" / "agnews.yaml").read_text())
    recipe = yaml.safe_load((FOLDER / "domain_weights_best.yaml").read_text())
    settings = {"max_steps": 40, "max_source_examples": 200, "output_dir": str(tmp_path / "run"), "hidden_size": 32}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **grid["settings"], **settings}))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    weights = DomainWeights.from_pretrained(tmp_path / "run" / "meta_module").summary()
    assert weights["weight_news"] > 1 > weights["weight_letters"]
    assert weights["weight_news"] > weights["weight_scrambled"]

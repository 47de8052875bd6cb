"""Recipes of few-shot learning, from the file to the run folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from meta_trainer import FeatureWiseTransform, MetaModule
from meta_trainer.cli import main
from meta_trainer.recipe import read_recipe, recipes_folder
from meta_trainer.tasks.few_shot.build import make_relation_net
from meta_trainer.tasks.few_shot.relation_net import RelationNet

FOLDER = recipes_folder() / "few_shot"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SMALL = {
    "held_out_domain": "infrared",
    "image_size": 8,
    "n_way": 3,
    "k_shot": 1,
    "num_queries": 2,
    "num_train_episodes": 6,
    "episodes_per_epoch": 2,
    "num_test_episodes": 5,
    "backbone_width": 2,
    "stem": "small",
    "per_device_eval_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def small_recipe(tmp_path, write_domain):
    """A recipe of the package on small data, with small sizes."""
    domains = [f"{name}={write_domain(name)}" for name in ("red", "green", "yellow", "infrared")]

    def write(file, **settings):
        path = tmp_path / "recipe.yaml"
        small = {**yaml.safe_load(Path(file).read_text()), **SMALL, "domains": domains}
        path.write_text(yaml.safe_dump({**small, "output_dir": str(tmp_path / "run"), **settings}))
        return str(path)

    return write


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_trains_and_is_tested(file, small_recipe, tmp_path):
    assert main(["train", "--config", small_recipe(file)]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    metrics = results["results"][0]["metrics"]
    assert results["metric"] == "accuracy"
    # Five episodes of six queries, in batches of two, two and one.
    assert metrics["accuracy"] * 30 == pytest.approx(round(metrics["accuracy"] * 30))
    assert 0 <= metrics["accuracy_interval"] < 1
    assert RelationNet.from_pretrained(tmp_path / "run").config.n_way == 3
    saved = tmp_path / "run" / "meta_module"
    assert '\nmodel = RelationNet.from_pretrained(".")\n' in (tmp_path / "run" / "README.md").read_text()
    assert saved.exists() == ("meta_module" in yaml.safe_load(file.read_text()))
    if saved.exists():
        assert isinstance(MetaModule.from_pretrained(saved), FeatureWiseTransform)
        history = results["results"][0]["history"]
        assert any("meta_module/mean_scale_noise" in row for row in history)


def test_a_resumed_run_ends_in_the_same_bytes(small_recipe, tmp_path):
    file = small_recipe(FOLDER / "feature_wise_evograd.yaml", save_strategy="steps", save_steps=2, max_steps=4)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["train", "--config", file, "--output_dir", str(straight)]) == 0
    shutil.copytree(straight / "checkpoint-2", stopped / "checkpoint-2")
    assert main(["train", "--config", file, "--output_dir", str(stopped), "--resume_from_checkpoint", "last"]) == 0
    for name in ("model.safetensors", "meta_module/model.safetensors"):
        ours, theirs = load_file(straight / name), load_file(stopped / name)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)
    results = [json.loads((run / "results.json").read_text())["results"][0] for run in (straight, stopped)]
    assert results[0]["metrics"]["accuracy"] == results[1]["metrics"]["accuracy"]


def test_a_second_run_starts_from_the_model_in_the_folder_that_the_first_one_left(small_recipe, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "--config", small_recipe(FOLDER / "plain.yaml"), "--output_dir", str(first)]) == 0
    # Nothing moves the weights of the second run, so that it ends with those that it started with.
    settings = {"model_name_or_path": str(first), "learning_rate": 0.0, "n_way": 2, "k_shot": 2, "seed": 7}
    file = small_recipe(FOLDER / "feature_wise_evograd.yaml", **settings)
    assert main(["train", "--config", file, "--output_dir", str(second)]) == 0

    ours, theirs = RelationNet.from_pretrained(second), RelationNet.from_pretrained(first)
    assert (ours.config.n_way, theirs.config.n_way) == (2, 3)
    for part in ("resnet", "relation_module"):
        started = dict(getattr(theirs, part).named_parameters())
        assert all(torch.equal(weight, started[name]) for name, weight in getattr(ours, part).named_parameters())
    fresh = make_relation_net(theirs.config, seed=1)
    assert not torch.equal(next(theirs.resnet.parameters()), next(fresh.resnet.parameters()))
    classifiers = [model.auxiliary_classifier.weight for model in (ours, theirs, make_relation_net(ours.config, 7))]
    assert torch.equal(classifiers[0], classifiers[2])
    assert not torch.equal(classifiers[0], classifiers[1])


def test_the_recipes_differ_only_in_what_is_transformed_and_learned():
    contents = {file.stem: yaml.safe_load(file.read_text()) for file in RECIPES}
    plain = contents.pop("plain")
    assert set(contents) == {
        "feature_wise_fixed", "feature_wise_t1t2", "feature_wise_evograd", "feature_wise_best",
    }  # fmt: skip
    for other in contents.values():
        assert {key for key in plain if other.get(key) != plain[key]} == {"description", "method"}
    fixed = contents["feature_wise_fixed"]
    assert {key: fixed[key] for key in fixed.keys() - plain.keys()} == {"fixed_transform": True}
    estimator = {"description", "method", "hypergradient", "num_candidates", "sigma", "temperature", "noise"}
    learned = [{k: v for k, v in contents[f"feature_wise_{name}"].items() if k not in estimator}
               for name in ("t1t2", "evograd", "best")]  # fmt: skip
    assert learned[0] == learned[1] == learned[2]


def test_the_recipe_has_the_papers_settings():
    read = read_recipe("few_shot/feature_wise_evograd.yaml", ["--use_cpu", "true"])
    task, training = read.task, read.training
    assert (task.n_way, task.k_shot, task.num_queries, task.image_size, task.backbone_width) == (5, 5, 16, 224, 64)
    assert (training.num_candidates, training.sigma, training.temperature, training.noise) == (2, 1e-3, 0.05, "sign")
    assert (training.learning_rate, training.meta_learning_rate, training.meta_weight_decay) == (1e-3, 1e-3, 1e-8)
    assert task.num_test_episodes == 600


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"meta_module": "meta_weight_net"}, "'language_modeling', not for task='few_shot'"),
        ({"meta_module": "representation_transform"}, "Choose among feature_wise_transform"),
        ({"fixed_transform": True}, "`fixed_transform` is for a baseline"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy should be 'sequential', got 'random'"),
        (
            {"model_name_or_path": "bert"},
            "model_name_or_path='bert': few-shot training starts from a model that an earlier run",
        ),
        ({"num_queries": 9}, r"has 0 classes of at least 10 images \(k_shot \+ num_queries\)"),
        ({"feature_wise_layers": ["*.nothing"]}, r"'\*\.nothing' matches no submodule of RelationNet"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(small_recipe, capsys, monkeypatch, settings, message):
    # Where there is no network, a name of the Hub would be asked for again and again.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["train", "--config", small_recipe(FOLDER / "feature_wise_evograd.yaml", **settings)]) == 2
    shown = capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        raise ValueError(shown)


@pytest.mark.real_data
def test_the_first_cell_of_the_grid_loads_the_image_sets(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("META_TRAINER_DATA", str(data_dir))
    grid = yaml.safe_load((FOLDER / "grids" / "small_images.yaml").read_text())
    cell = {**yaml.safe_load((FOLDER / "feature_wise_evograd.yaml").read_text()), **grid["settings"]}
    tiny = {"held_out_domain": "gtsrb", "k_shot": 5, "max_images_per_class": 20, "max_steps": 2, "num_test_episodes": 2}
    (tmp_path / "cell.yaml").write_text(yaml.safe_dump({**cell, **tiny, "output_dir": str(tmp_path / "run")}))
    assert main(["train", "--config", str(tmp_path / "cell.yaml")]) == 0

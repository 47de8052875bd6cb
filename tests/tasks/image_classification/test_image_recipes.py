"""Recipes of image classification, from the file to the run folder."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from meta_trainer import InputRotation, MetaWeightNet
from meta_trainer.cli import main
from meta_trainer.recipe import read_recipe, recipes_folder

ROTATION, CIFAR, DECAY = (recipes_folder() / name for name in ("rotation", "image_classification", "weight_decay"))
RECIPES = sorted(file for folder in (ROTATION, CIFAR, DECAY) for file in folder.glob("*.yaml"))
SMALL = {
    "data": None,
    "image_column": "image",
    "image_model": "lenet",
    "num_meta_examples": 8,
    "max_train_examples": 24,
    "random_crop_padding": 2,
    "image_mean": [0.5],
    "image_std": [0.5],
    "per_device_train_batch_size": 4,
    "per_device_meta_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


def name(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


@pytest.fixture
def run_small(small, tmp_path):
    """Run a recipe for two steps on forty small images."""

    def run(file: Path, **settings: object) -> Path:
        files = {kind: getattr(small(), kind) for kind in ("train_file", "test_file")}
        content = {
            **yaml.safe_load(file.read_text()),
            **SMALL,
            **files,
            "output_dir": str(tmp_path / "run"),
            **settings,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_every_recipe_runs_for_two_steps_and_leaves_its_results(run_small, file):
    run = run_small(file)
    settings = yaml.safe_load(file.read_text())
    (result,) = json.loads((run / "results.json").read_text())["results"]
    assert (result["name"], result["steps"]) == (settings["method"], 2)
    assert 0 <= result["metrics"]["accuracy"] <= 1
    weighs = "meta_weight_net" in settings.get("meta_module", [])
    file = run / ("training_weights.parquet" if weighs else "training_labels.parquet")
    labels = pyarrow.parquet.read_table(file).to_pylist()
    own = ["row", "label", "predicted_label", "trusted_label", "is_corrupted", "loss", "weight"]
    added = ("predicted_label", "loss", "weight")
    assert list(labels[0]) == [column for column in own if weighs or column not in added]
    assert {row["label"] for row in labels} == {"left", "right"}
    assert '\nmodel = LeNet.from_pretrained(".")\n' in (run / "README.md").read_text()
    wrong = 0 if settings.get("train_on_meta_alone") else round(24 * settings.get("label_noise_share", 0))
    assert sum(row["is_corrupted"] for row in labels) == wrong
    if "input_rotation" in settings.get("meta_module", []):
        angles = [row["meta_module/angle"] for row in result["history"] if "meta_module/angle" in row]
        module = InputRotation.from_pretrained(run / "meta_module")
        assert len(angles) == 2
        assert 0 < abs(module.summary()["angle"].item()) < 2
    elif "learned_weight_decay" in settings.get("meta_module", []):
        logged = {key for key in result["history"][0] if key.startswith("meta_module/")}
        assert logged == {f"meta_module/weight_decay_*{part}*" for part in ("features", "classifier")}
    elif "meta_module" in settings:
        assert isinstance(MetaWeightNet.from_pretrained(run / "meta_module"), MetaWeightNet)


def test_a_residual_network_has_the_second_derivatives_of_t1t2(run_small):
    run = run_small(CIFAR / "meta_weight_net_t1t2.yaml", image_model="resnet8", max_steps=1, meta_delay_steps=0)
    (result,) = json.loads((run / "results.json").read_text())["results"]
    assert result["history"][0]["meta/grad_norm"] > 0


@pytest.mark.parametrize(
    ("folder", "of_baselines", "of_methods"),
    [
        (ROTATION, {"rotate_train_degrees"}, set()),
        (CIFAR, {"train_on_meta", "train_on_meta_alone"}, {"train_on_meta"}),
        (DECAY, {"train_on_meta"}, {"weight_decay", "initial_weight_decay"}),
    ],
)
def test_the_recipes_differ_only_in_what_is_meta_learned_or_trained_on(folder, of_baselines, of_methods):
    contents = {file.stem: yaml.safe_load(file.read_text()) for file in folder.glob("*.yaml")}
    plain = contents.pop("plain")
    for stem, other in contents.items():
        changed = {key for key in plain if other.get(key) != plain[key]} - {"description", "method"}
        added = {key for key in other.keys() - plain.keys() if not is_meta(key)}
        assert changed | added <= (of_methods if "meta_module" in other else of_baselines), stem


@pytest.mark.parametrize("file", sorted(DECAY.glob("*.yaml")), ids=name)
def test_a_learned_weight_decay_stands_for_that_of_the_optimizer(file):
    settings = yaml.safe_load(file.read_text())
    assert settings["weight_decay"] == (0 if "meta_module" in settings else 0.01)


def is_meta(key: str) -> bool:
    estimator = {"hypergradient", "num_candidates", "sigma", "temperature", "noise", "antithetic", "inner_step"}
    prefixes = ("meta_", "per_device_meta", "weight_net", "weight_decay_groups", "perturb")
    return key in estimator or key.startswith(prefixes)


def test_the_target_of_the_matched_digits_is_what_they_are_trained_on():
    matched = yaml.safe_load((ROTATION / "matched.yaml").read_text())
    assert matched["rotate_train_degrees"] == matched["rotate_target_degrees"] == 30


def test_images_alone_can_be_turned(tmp_path):
    settings = ["--task", "text_classification", "--data", "generated", "--meta_module", "input_rotation"]
    with pytest.raises(ValueError, match="is for task='image_classification', not for task='text_class"):
        read_recipe(None, [*settings, "--use_cpu", "true", "--output_dir", str(tmp_path)])

"""Recipes of text classification, from the file to the run folder."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from meta_trainer import DomainWeights, MetaTrainer, MetaWeightNet
from meta_trainer.cli import main
from meta_trainer.recipe import read_recipe, recipes_folder
from meta_trainer.tasks.text_classification import TextClassificationArguments

FOLDER = recipes_folder() / "text_classification"
TINY = {
    "task": "text_classification",
    "data": "generated",
    "num_meta_examples": 20,
    "max_train_examples": 60,
    "label_noise": "flip",
    "label_noise_share": 0.4,
    "max_length": 24,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 400,
    "meta_module": "meta_weight_net",
    "perturb": "head",
    "per_device_meta_batch_size": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def recipe(folder: Path, **settings: object) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**TINY, "output_dir": str(folder / "run"), **settings}))
    return str(file)


@pytest.fixture
def card_tasks(monkeypatch):
    """Tasks that the model cards of a run are made for."""
    tasks: list[str] = []
    create = MetaTrainer.create_model_card

    def record(trainer: MetaTrainer, **settings: str) -> None:
        tasks.append(settings["tasks"])
        create(trainer, **settings)

    monkeypatch.setattr(MetaTrainer, "create_model_card", record)
    return tasks


def test_a_run_leaves_model_meta_module_card_labels_and_results(tmp_path, card_tasks):
    assert main(["train", "--config", recipe(tmp_path, compare_with_baseline=True, train_on_meta=True)]) == 0
    run = tmp_path / "run"
    assert isinstance(MetaWeightNet.from_pretrained(run / "meta_module"), MetaWeightNet)
    results = json.loads((run / "results.json").read_text())
    assert [result["name"] for result in results["results"]] == ["plain training on both sets", "this recipe"]
    assert results["metric"] == "accuracy"
    assert "on the generated dataset" in (run / "README.md").read_text()
    assert all(0 <= result["metrics"]["macro_f1"] <= 1 for result in results["results"])
    assert card_tasks == ["text-classification"] * 2

    labels = pyarrow.parquet.read_table(run / "training_labels.parquet").to_pylist()
    assert len(labels) == 60
    assert sum(row["is_corrupted"] for row in labels) == 24
    assert all(row["is_corrupted"] == (row["label"] != row["trusted_label"]) for row in labels)
    assert len(pyarrow.parquet.read_table(run / "baseline" / "training_labels.parquet")) == 80


def test_a_column_of_sources_is_weighed(tmp_path, card_tasks):
    rows = [
        {"text": f"a {kind} text {i}", "label": kind, "origin": f"site {i % 3}"} for i, kind in enumerate("ab" * 30)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"data": None, "train_file": str(file), "test_file": str(file), "domain_column": "origin"}
    config = recipe(tmp_path, **settings, meta_module="domain_weights", eval_strategy="no", max_train_examples=None)
    assert main(["train", "--config", config]) == 0
    module = DomainWeights.from_pretrained(tmp_path / "run" / "meta_module")
    assert module.domains == ["site 0", "site 1", "site 2"]
    assert module.all_weights().std() > 0
    labels = pyarrow.parquet.read_table(tmp_path / "run" / "training_labels.parquet").to_pylist()
    assert all(row["domain"] == rows[row["row"]]["origin"] for row in labels)


WEIGHT_DECAY = recipes_folder() / "weight_decay"


@pytest.mark.parametrize("name", sorted(file.stem for file in WEIGHT_DECAY.glob("*.yaml")))
def test_the_recipes_of_learned_weight_decay_run(tmp_path, name):
    base = yaml.safe_load((WEIGHT_DECAY / f"{name}.yaml").read_text())
    keys = ("meta_module", "perturb", "label_noise", "label_noise_share", "eval_strategy", "logging_steps")
    own = {key: value for key, value in TINY.items() if key not in keys}
    clean = {"label_noise": "none", "label_noise_share": 0.0, "label_column": "label"}
    short = {"max_steps": 2, "logging_steps": 1, "perturb": "all", "meta_module": base.get("meta_module", [])}
    config = recipe(tmp_path, **{**base, **own, **clean, **short})
    assert main(["train", "--config", config]) == 0
    history = json.loads((tmp_path / "run" / "results.json").read_text())["results"][0]["history"]
    logged = {key for key in history[0] if key.startswith("meta_module/weight_decay")}
    assert len(logged) == 3 * ("meta_module" in base)


def test_the_recipes_of_learned_weight_decay_differ_only_in_what_is_meta_learned_or_trained_on():
    contents = {file.stem: yaml.safe_load(file.read_text()) for file in WEIGHT_DECAY.glob("*.yaml")}
    plain = contents.pop("plain")
    assert set(contents) == {"plain_with_meta_set", "evograd", "t1t2", "best"}
    for name, other in contents.items():
        learned = {"weight_decay"} if "meta_module" in other else set()
        assert {k for k in plain if other.get(k) != plain[k]} == {"description", "method", *learned}, name
        assert other["weight_decay"] == (0 if learned else plain["weight_decay"])


def test_the_task_says_which_keys_there_are(tmp_path):
    assert isinstance(read_recipe(recipe(tmp_path), []).task, TextClassificationArguments)
    from_command_line = ["--task", "text_classification", "--data", "generated", "--use_cpu", "true"]
    assert isinstance(read_recipe(None, from_command_line).task, TextClassificationArguments)
    with pytest.raises(ValueError, match=r"Unknown key '--label_nois'\. Did you mean 'label_noise'"):
        read_recipe(recipe(tmp_path), ["--label_nois", "flip"])
    with pytest.raises(ValueError, match=r"'--target_data'\. It is a key of task='ner', and this is task='text_class"):
        read_recipe(recipe(tmp_path), ["--target_data", "generated"])
    with pytest.raises(ValueError, match=r"unknown key 'data'\. It is a key of task='text_classification'"):
        read_recipe(recipe(tmp_path, task="ner"), [])


def test_help_shows_the_keys_of_the_task(capsys):
    assert main(["train", "--help", "--task", "text_classification"]) == 0
    shown = capsys.readouterr().out
    assert "--label_noise_share" in shown
    assert "--target_data" not in shown
    assert main(["train", "--help", "--task", "parsing"]) == 2
    assert "parsing" in capsys.readouterr().err


def test_training_on_the_meta_set_is_refused_where_a_meta_module_learns_from_it(tmp_path):
    with pytest.raises(ValueError, match="`train_on_meta` is for a baseline"):
        read_recipe(recipe(tmp_path, train_on_meta=True), [])


def test_the_recipes_differ_only_in_what_is_meta_learned_or_trained_on():
    contents = {file.stem: yaml.safe_load(file.read_text()) for file in FOLDER.glob("*.yaml")}
    plain = contents.pop("plain")
    assert set(contents) == {"plain_with_meta_set", "meta_weight_net_evograd"}
    for other in contents.values():
        assert {key for key in plain if other.get(key) != plain[key]} == {"description", "method"}
    both = contents["plain_with_meta_set"]
    assert {key: both[key] for key in both.keys() - plain.keys()} == {"train_on_meta": True}


def test_the_recipe_of_meta_weight_net_sets_clean_questions_apart_and_flips_two_labels_in_five():
    read = read_recipe("text_classification/meta_weight_net_evograd.yaml", ["--use_cpu", "true"])
    task, training = read.task, read.training
    assert (task.num_meta_examples, task.label_noise, task.label_noise_share) == (200, "flip", 0.4)
    assert (read.module.meta_module, training.hypergradient, training.perturb) == (
        ["meta_weight_net"], "evograd", ["head"],
    )  # fmt: skip
    assert (training.per_device_train_batch_size, training.per_device_meta_batch_size) == (32, 32)


def test_every_grid_names_recipes_and_settings_that_are_valid(tmp_path, monkeypatch):
    monkeypatch.setenv("META_TRAINER_DATA", str(tmp_path))
    (tmp_path / "text").mkdir()
    for file in (*(FOLDER / "grids").glob("*.yaml"), *(WEIGHT_DECAY / "grids").glob("*.yaml")):
        grid = yaml.safe_load(file.read_text())
        for name in ("train_file", "test_file"):
            (tmp_path / grid["settings"][name]).touch()
        for base in grid["recipes"].values():
            for target in grid["targets"].values():
                cell = {**yaml.safe_load((recipes_folder() / base).read_text()), **grid["settings"], **target}
                (tmp_path / "cell.yaml").write_text(yaml.safe_dump(cell))
                assert read_recipe(str(tmp_path / "cell.yaml"), []).task.train_file == "text/trec6_train.parquet"

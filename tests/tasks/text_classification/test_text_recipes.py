"""Recipes of text classification, from the file to the run folder."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml

from meta_trainer import DomainWeights, MetaTrainer, MetaWeightNet
from meta_trainer.cli import main
from meta_trainer.recipe import read_recipe, recipes_folder
from meta_trainer.tasks.text_classification import TextClassificationArguments
from meta_trainer.tasks.text_classification.corpus import SIZES, generate_corpus

FOLDER = recipes_folder() / "text_classification"
TOPICS = ("business", "culture", "science", "sport")
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

    baseline = pyarrow.parquet.read_table(run / "baseline" / "training_labels.parquet").to_pylist()
    assert len(baseline) == 80
    assert baseline[0].keys() == {"row", "text", "label", "trusted_label", "is_corrupted"}


def test_a_run_that_weighs_examples_leaves_their_weights_in_the_place_of_their_labels(tmp_path):
    assert main(["train", "--config", recipe(tmp_path)]) == 0
    run = tmp_path / "run"
    rows = pyarrow.parquet.read_table(run / "training_weights.parquet").to_pylist()
    assert len(rows) == 60
    assert sum(row["is_corrupted"] for row in rows) == 24
    assert all(row["is_corrupted"] == (row["label"] != row["trusted_label"]) for row in rows)
    assert {name for row in rows for name in (row["label"], row["predicted_label"])} <= set(TOPICS)
    assert [row["weight"] for row in rows] == sorted(row["weight"] for row in rows)
    corpus = generate_corpus("train")
    assert all(corpus[row["row"]]["text"] == row["text"] for row in rows)
    assert not (run / "training_labels.parquet").exists()
    assert (run / "weights.png").is_file()

    # The saved meta module gives the weights of the file, by the losses of the file.
    module = MetaWeightNet.from_pretrained(run / "meta_module")
    losses, weights = (torch.tensor([row[name] for row in rows]) for name in ("loss", "weight"))
    torch.testing.assert_close(module(losses).detach(), weights, check_dtype=False)
    (result,) = json.loads((run / "results.json").read_text())["results"]
    assert 0 <= result["metrics"]["corrupted_auc"] <= 1
    assert 0 <= result["metrics"]["corrupted_auc_by_loss"] <= 1
    assert result["history"][0]["meta_module/weight_at_loss_0.5"] > 0


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
    found = pyarrow.parquet.read_table(tmp_path / "run" / "training_weights.parquet").to_pylist()
    assert all(row["domain"] == rows[row["row"]]["origin"] for row in found)
    weights = dict(zip(module.domains, module.all_weights().tolist(), strict=True))
    assert [row["weight"] for row in found] == pytest.approx([weights[row["domain"]] for row in found])


def test_a_baseline_on_both_sets_needs_no_sources_of_checked_rows(tmp_path):
    rows = [{"text": f"a {kind} text {i}", "label": kind, "origin": f"site {i % 3}"} for i, kind in enumerate("ab" * 9)]
    file, checked = tmp_path / "rows.jsonl", tmp_path / "checked.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    checked.write_text("\n".join(json.dumps({"text": row["text"], "label": row["label"]}) for row in rows[:6]))
    settings = {"data": None, "train_file": str(file), "meta_file": str(checked), "test_file": str(file)}
    settings |= {"domain_column": "origin", "label_noise": "none", "label_noise_share": 0.0, "max_train_examples": None}
    both = {
        "meta_module": "domain_weights",
        "eval_strategy": "no",
        "compare_with_baseline": True,
        "train_on_meta": True,
    }
    assert main(["train", "--config", recipe(tmp_path, **settings, **both)]) == 0
    baseline = pyarrow.parquet.read_table(tmp_path / "run" / "baseline" / "training_labels.parquet").to_pylist()
    assert [row["domain"] for row in baseline[len(rows) :]] == [None] * 6
    assert baseline[0].keys() == {"row", "text", "label", "domain"}


def test_the_task_says_which_keys_there_are(tmp_path):
    assert isinstance(read_recipe(recipe(tmp_path), []).task, TextClassificationArguments)
    from_command_line = ["--task", "text_classification", "--data", "generated", "--use_cpu", "true"]
    assert isinstance(read_recipe(None, from_command_line).task, TextClassificationArguments)
    with pytest.raises(ValueError, match=r"Unknown key '--label_nois'\. Did you mean 'label_noise'"):
        read_recipe(recipe(tmp_path), ["--label_nois", "flip"])
    with pytest.raises(ValueError, match=r"'--target_data'\. It is a key of task='ner', and this is task='text_class"):
        read_recipe(recipe(tmp_path), ["--target_data", "generated"])
    with pytest.raises(ValueError, match=r"'data'\. It is a key of task='noisy_ner' or 'text_classification' or"):
        read_recipe(recipe(tmp_path, task="ner"), [])


def test_help_shows_the_keys_of_the_task(capsys):
    assert main(["train", "--help", "--task", "text_classification"]) == 0
    shown = capsys.readouterr().out
    assert "--label_noise_share" in shown
    assert "--target_data" not in shown
    assert main(["train", "--help", "--task", "parsing"]) == 2
    assert "parsing" in capsys.readouterr().err


def test_training_on_the_meta_set_is_refused_where_another_meta_module_learns_from_it(tmp_path):
    for modules in ("learned_weight_decay", ["meta_weight_net", "learned_weight_decay"]):
        with pytest.raises(ValueError, match="`train_on_meta` is for a baseline, or for meta_module='meta_weight_net'"):
            read_recipe(recipe(tmp_path, train_on_meta=True, meta_module=modules), [])


def test_training_on_the_meta_set_alone_is_for_a_baseline(tmp_path):
    with pytest.raises(ValueError, match="`train_on_meta_alone` is for a baseline"):
        read_recipe(recipe(tmp_path, train_on_meta_alone=True), [])
    assert main(["train", "--config", recipe(tmp_path, train_on_meta_alone=True, compare_with_baseline=True)]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert results[0]["name"] == "plain training on the meta set"
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "training_weights.parquet").to_pylist()
    assert len({row["row"] for row in rows}) == len(rows) == 60
    baseline = pyarrow.parquet.read_table(tmp_path / "run" / "baseline" / "training_labels.parquet").to_pylist()
    assert (len(baseline), len({row["row"] for row in baseline})) == (60, 20)


def test_weights_beside_trusted_rows_that_are_trained_on_and_by_the_label(tmp_path, caplog):
    file = recipe(tmp_path, train_on_meta=True, weight_net_reads_label=True, compare_with_baseline=True)
    assert main(["train", "--config", file]) == 0
    run = tmp_path / "run"
    module = MetaWeightNet.from_pretrained(run / "meta_module")
    assert module.num_classes == len(TOPICS)
    assert module.class_shifts.abs().max() > 0
    rows = pyarrow.parquet.read_table(run / "training_weights.parquet").to_pylist()
    assert len(rows) == 60
    assert sum(row["is_corrupted"] for row in rows) == 24
    losses, weights = (torch.tensor([row[name] for row in rows]) for name in ("loss", "weight"))
    classes = torch.tensor([TOPICS.index(row["label"]) for row in rows])
    torch.testing.assert_close(module(losses, classes).detach(), weights, check_dtype=False)
    baseline = pyarrow.parquet.read_table(run / "baseline" / "training_labels.parquet")
    assert len(baseline) == 80
    results = json.loads((run / "results.json").read_text())["results"]
    assert all(row["meta/overlap"] == 0 for row in results[1]["history"] if "meta/overlap" in row)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"meta_module": "learned_weight_decay"}, r"got meta_module=\['learned_weight_decay'\]"),
        ({"task": "noisy_ner", "weight_net_level": "sentence"}, "a loss belongs to all labels of a sentence"),
        ({"weight_net_level": "sentence"}, "a loss belongs to all labels of a sentence"),
        ({"task": "language_modeling"}, "labels that are classes, got .* task='language_modeling'"),
    ],
)
def test_weights_by_the_label_are_refused_where_there_is_no_such_label(tmp_path, settings, message):
    other_task = {"task": settings.get("task", TINY["task"]), "output_dir": str(tmp_path), "use_cpu": True}
    corpus = {"sources": ["a=generated", "b=generated"]} if settings.get("task") == "language_modeling" else {}
    corpus = corpus or {"data": "generated"}
    content = {"meta_module": "meta_weight_net", "weight_net_reads_label": True, **other_task, **corpus, **settings}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_recipe(str(file), [])


# What takes a recipe off the Hub and makes it small.
OFFLINE = [
    "--model_name_or_path",
    "none",
    "--data",
    "generated",
    "--label_column",
    "label",
    "--num_meta_examples",
    "20",
]
SMALL = ["--max_train_examples", "40", "--hidden_size", "16", "--num_hidden_layers", "1", "--intermediate_size", "16"]
SHORT = [
    "--vocab_size",
    "400",
    "--max_steps",
    "2",
    "--logging_steps",
    "1",
    "--use_cpu",
    "true",
    "--disable_tqdm",
    "true",
]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_runs(file, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "test", 20)
    settings = [*OFFLINE, *SMALL, *SHORT, "--output_dir", str(tmp_path)]
    assert main(["train", "--config", str(file), *settings]) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["steps"] == 2
    assert ("corrupted_auc" in result["metrics"]) == ("meta_weight_net" in file.stem)


def test_the_recipe_of_wrong_labels_compares_weights_with_plain_training_and_lists_the_suspicious(tmp_path, capsys):
    settings = ["--max_steps", "3", "--meta_delay_steps", "1", "--logging_steps", "1", "--use_cpu", "true"]
    assert main(["train", "--config", "wrong_labels.yaml", *settings, "--output_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(r["name"], r["steps"]) for r in results] == [
        ("plain training on both sets", 3), ("Meta-Weight-Net, guided EvoGrad", 3),
    ]  # fmt: skip
    rows = pyarrow.parquet.read_table(tmp_path / "training_weights.parquet").to_pylist()
    assert len(rows) == 1140
    assert sum(row["is_corrupted"] for row in rows) == 456
    assert "the most suspicious label first" in " ".join(capsys.readouterr().out.split())


def test_scores_during_training_need_a_set_for_them(tmp_path, capsys):
    assert main(["train", "--config", recipe(tmp_path, validation_split=None)]) == 2
    assert "eval_strategy='steps' scores a validation set during training, of which" in capsys.readouterr().err


def test_the_recipe_of_meta_weight_net_sets_clean_questions_apart_and_flips_two_labels_in_five():
    read = read_recipe("text_classification/meta_weight_net_evograd.yaml", ["--use_cpu", "true"])
    task, training = read.task, read.training
    assert (task.num_meta_examples, task.label_noise, task.label_noise_share) == (200, "flip", 0.4)
    assert (read.module.meta_module, training.hypergradient, training.perturb) == (
        ["meta_weight_net"], "evograd", ["head"],
    )  # fmt: skip
    assert (training.per_device_train_batch_size, training.per_device_meta_batch_size) == (32, 32)

"""Recipes of noisy named entity recognition, from the file to the run folder."""

import json

import pyarrow.parquet
import pytest

from meta_trainer.cli import main
from meta_trainer.recipe import read_recipe, recipes_folder
from meta_trainer.tasks.ner.corpus import SIZES

FOLDER = recipes_folder() / "noisy_ner"
RECIPES = sorted(FOLDER.glob("*.yaml"))
# What takes a recipe off the Hub and makes it small.
OFFLINE = ["--model_name_or_path", "none", "--data", "generated", "--subset", "none", "--num_meta_examples", "10"]
SMALL = ["--max_train_examples", "24", "--hidden_size", "16", "--num_hidden_layers", "1", "--intermediate_size", "16"]
SHORT = ["--per_device_train_batch_size", "8", "--per_device_meta_batch_size", "4", "--max_steps", "2"]
QUIET = ["--vocab_size", "400", "--logging_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_runs(file, tmp_path, monkeypatch):
    for split in ("train", "validation", "test"):
        monkeypatch.setitem(SIZES, split, 40)
    settings = [*OFFLINE, *SMALL, *SHORT, *QUIET, "--output_dir", str(tmp_path)]
    assert main(["train", "--config", str(file), *settings]) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["steps"] == 2
    weighs = "meta_weight_net" in file.stem
    assert ("corrupted_auc" in result["metrics"]) == (tmp_path / "weights.png").is_file() == weighs
    if weighs:
        rows = pyarrow.parquet.read_table(tmp_path / "training_weights.parquet").to_pylist()
        word = ["row", "token", "word", "text", "label", "predicted_label", "trusted_label", "is_corrupted"]
        assert list(rows[0]) == [*word, "loss", "weight"]
        weights = {(row["row"], row["weight"]) for row in rows}
        assert (len(weights) == len({row["row"] for row in rows})) == (file.stem == "meta_weight_net_sentences")


def test_a_transform_of_source_sentences_is_refused():
    settings = ["--task", "noisy_ner", "--data", "generated", "--use_cpu", "true"]
    with pytest.raises(ValueError, match="'representation_transform' is for task='ner', not for task='noisy_ner'"):
        read_recipe(None, [*settings, "--meta_module", "representation_transform"])
    with pytest.raises(ValueError, match="`train_on_meta` is for a baseline"):
        read_recipe(None, [*settings, "--meta_module", "learned_weight_decay", "--train_on_meta", "true"])

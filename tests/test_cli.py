"""The command line, run as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from meta_trainer import MetaModule, MetaModuleList, MetaTrainer, MetaWeightNet, RepresentationTransform
from meta_trainer.cli import main
from meta_trainer.recipe import find_recipe

TINY = {
    "source_data": "generated",
    "target_data": "generated",
    "max_source_examples": 40,
    "max_target_examples": 20,
    "max_length": 32,
    "target_batch_size": 2,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 400,
    "meta_module": "representation_transform",
    "rtn_bottleneck_size": 4,
    "perturb": "head",
    "per_device_meta_batch_size": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 64,
    "max_steps": 6,
    "logging_steps": 2,
    "save_steps": 3,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 5,
}


@pytest.fixture
def recipe(tmp_path):
    def write(**settings):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "run"), **settings}))
        return str(file)

    return write


def test_a_run_leaves_model_meta_module_card_picture_and_results(recipe, tmp_path, capfd):
    assert main(["train", "--config", recipe(compare_with_baseline=True)]) == 0
    run = tmp_path / "run"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "recipe.yaml", "results.png"):
        assert (run / name).is_file()
    assert {file.name for file in (run / "meta_module").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert isinstance(RepresentationTransform.from_pretrained(run / "meta_module"), RepresentationTransform)
    assert (run / "baseline" / "model.safetensors").is_file()
    assert not (run / "baseline" / "meta_module").exists()

    results = json.loads((run / "results.json").read_text())
    assert [result["name"] for result in results["results"]] == ["joint training", "this recipe"]
    assert all(0 <= result["metrics"]["f1"] <= 1 and result["steps"] == 6 for result in results["results"])
    assert results["environment"]["torch"] == torch.__version__
    assert results["settings"]["seed"] == 5
    output = capfd.readouterr().out
    assert "time per step" in output
    assert "peak memory" in output


def test_a_resumed_run_ends_in_the_same_bytes(recipe, tmp_path):
    file = recipe(meta_module=["representation_transform", "meta_weight_net"])
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["train", "--config", file, "--output_dir", str(straight)]) == 0
    assert main(["train", "--config", file, "--output_dir", str(stopped)]) == 0
    for name in ("model.safetensors", "meta_module/model.safetensors"):
        (stopped / name).unlink()
    for later in stopped.glob("checkpoint-6"):
        later.rename(tmp_path / "out of the way")
    resume = ["--output_dir", str(stopped), "--resume_from_checkpoint", "last"]
    assert main(["train", "--config", file, *resume]) == 0
    for name in ("model.safetensors", "meta_module/model.safetensors"):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()
    assert isinstance(MetaModuleList.from_pretrained(stopped / "meta_module"), MetaModuleList)


@pytest.mark.parametrize(
    "name",
    ["metaxl_with_weights_evograd", "metaxl_with_weights_t1t2", "metaxl_with_weights_best", "meta_weight_net_evograd",
     "meta_weight_net_best"],
)  # fmt: skip
def test_the_recipes_with_a_weight_net_run_two_steps(recipe, tmp_path, name):
    base = yaml.safe_load(find_recipe(f"ner/{name}.yaml").read_text())
    data = {"model_name_or_path": None, "source_subset": None, "target_subset": None, "eval_strategy": "no"}
    short = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "load_best_model_at_end": False}
    both = {"rtn_layers": "-1"} if "rtn_layers" in base else {}
    own = {key: TINY[key] for key in TINY if not key.startswith(("rtn", "meta_module"))}
    file = recipe(**{**base, **own, **data, **short, **both, "metric_for_best_model": None, "meta_learning_rate": 0.01})
    assert main(["train", "--config", file]) == 0
    modules = MetaModule.from_pretrained(tmp_path / "run" / "meta_module")
    kinds = [type(member).__name__ for member in getattr(modules, "members", [modules])]
    assert kinds == ["RepresentationTransform", "MetaWeightNet"][2 - len(kinds) :]
    history = json.loads((tmp_path / "run" / "results.json").read_text())["results"][0]["history"]
    assert all(entry["meta/skipped"] == 0 for entry in history if "loss" in entry)


@pytest.mark.parametrize(
    ("meta_module", "marks"),
    [
        (["meta_weight_net"], {"is_trusted"}),
        (["representation_transform"], {"is_source"}),
        (["representation_transform", "meta_weight_net"], {"is_source", "is_trusted"}),
    ],
    ids=["weights", "transform", "both"],
)
def test_train_batches_say_of_their_sentences_what_the_meta_modules_read(recipe, monkeypatch, meta_module, marks):
    found, training_step = [], MetaTrainer.training_step

    def recorded(self, model, inputs, *others):
        found.append({name: inputs[name].tolist() for name in ("is_source", "is_trusted") if name in inputs})
        return training_step(self, model, inputs, *others)

    monkeypatch.setattr(MetaTrainer, "training_step", recorded)
    assert main(["train", "--config", recipe(meta_module=meta_module, max_steps=2, save_strategy="no")]) == 0
    of_source = {"is_source": [True] * 4 + [False] * 2, "is_trusted": [False] * 4 + [True] * 2}
    assert found == [{name: of_source[name] for name in marks}] * 2


def test_the_weight_net_weighs_source_sentences_and_trusts_those_of_the_target(recipe, monkeypatch):
    found, example_weights = [], MetaWeightNet.example_weights

    def recorded(self, losses, batch):
        weights = example_weights(self, losses, batch)
        found.append((weights.detach(), batch["is_trusted"][batch["example_of_loss"]]))
        return weights

    monkeypatch.setattr(MetaWeightNet, "example_weights", recorded)
    assert main(["train", "--config", recipe(meta_module="meta_weight_net", max_steps=2, save_strategy="no")]) == 0
    assert found
    for weights, trusted in found:
        assert trusted.any()
        assert (weights[trusted] == 1).all()
        assert (weights[~trusted] < 1).all()


def test_a_run_that_gets_sigterm_saves_and_says_how_to_go_on(recipe, tmp_path, capfd, monkeypatch):
    file = recipe(compare_with_baseline=True)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["train", "--config", file, "--output_dir", str(straight)]) == 0
    meta_step = MetaTrainer.meta_step

    def with_sigterm(self, *args):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return meta_step(self, *args)

    monkeypatch.setattr(MetaTrainer, "meta_step", with_sigterm)
    capfd.readouterr()
    assert main(["train", "--config", file, "--output_dir", str(stopped)]) == 143
    monkeypatch.undo()
    error = capfd.readouterr().err
    assert f"stopped by SIGTERM; {stopped / 'checkpoint-2'} is saved." in error
    assert "--resume_from_checkpoint last" in error
    assert not (stopped / "results.json").exists()

    resume = ["--output_dir", str(stopped), "--resume_from_checkpoint", "last"]
    assert main(["train", "--config", file, *resume]) == 0
    for name in ("baseline/model.safetensors", "model.safetensors", "meta_module/model.safetensors"):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()


def test_a_run_killed_in_its_first_save_starts_anew_and_a_damaged_checkpoint_is_refused(
    recipe, tmp_path, capfd, caplog
):
    file, run = recipe(max_steps=2, save_steps=1), tmp_path / "run"
    half_written = run / "checkpoint-1"
    half_written.mkdir(parents=True)
    (half_written / "model.safetensors").touch()
    assert main(["train", "--config", file, "--resume_from_checkpoint", "last"]) == 0
    assert "half-written: training starts anew" in caplog.text

    (run / "checkpoint-2/meta_state.pt").write_bytes(b"")
    assert main(["train", "--config", file, "--resume_from_checkpoint", str(run / "checkpoint-2")]) == 2
    error = capfd.readouterr().err
    assert "checkpoint-2 is incomplete or was changed: meta_state.pt has 0 bytes" in error
    assert "Traceback" not in error
    # The one before it is there.
    assert main(["train", "--config", file, "--resume_from_checkpoint", "last"]) == 0
    assert "checkpoint-2 is incomplete and passed over" in caplog.text


def test_the_method_learns_the_same_beside_a_baseline_and_alone(recipe, tmp_path):
    alone, beside = str(tmp_path / "alone"), str(tmp_path / "beside")
    assert main(["train", "--config", recipe(), "--output_dir", alone]) == 0
    assert main(["train", "--config", recipe(), "--compare_with_baseline", "true", "--output_dir", beside]) == 0
    first, second = (load_file(f"{folder}/model.safetensors") for folder in (alone, beside))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_fixed_meta_split_and_the_weight_net_run(recipe, tmp_path):
    file = recipe(meta_module="meta_weight_net", meta_split="fixed", perturb="all", hypergradient="finite_difference")
    assert main(["train", "--config", file]) == 0
    history = json.loads((tmp_path / "run" / "results.json").read_text())["results"][0]["history"]
    assert all(entry["meta/skipped"] == 0 for entry in history if "loss" in entry)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hypergradeint", "t1t2"], "Did you mean 'hypergradient'"),
        (["--rtn_layers", "7"], "counts the model's 1 blocks"),
        (["--perturb", "clasifier.*"], "matches no trainable parameter"),
        (["--target_batch_size", "50"], "there are 20: lower target_batch_size"),
        (["--model_name_or_path", "./no/such/folder"], "no/such/folder"),
        (["--source_subset", "xx_XX"], "xx_XX"),
        (["--resume_from_checkpoint", "last"], "no checkpoint"),
        (["--resume_from_checkpoint", "./no/such/checkpoint"], "no checkpoint"),
        (["--compare_with_baseline", "true", "--resume_from_checkpoint", "./x"], "should be 'last'"),
    ],
)
def test_wrong_input_gives_one_message_and_exit_code_2(recipe, capfd, arguments, message):
    capfd.readouterr()
    assert main(["train", "--config", recipe(), *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "meta-trainer: error: " in error
    assert "Traceback" not in error


def test_a_comparison_resumes_each_method_from_its_own_last_checkpoint(recipe, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        assert main(["train", "--config", recipe(compare_with_baseline=True), "--output_dir", str(folder)]) == 0
    # As if the run had been stopped in the baseline.
    shutil.rmtree(stopped / "baseline" / "checkpoint-6")
    for checkpoint in stopped.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    resume = ["--output_dir", str(stopped), "--resume_from_checkpoint", "last"]
    assert main(["train", "--config", recipe(compare_with_baseline=True), *resume]) == 0
    for name in ("baseline/model.safetensors", "model.safetensors", "meta_module/model.safetensors"):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()


def test_no_recipe_at_all_is_refused(capsys):
    assert main(["train"]) == 2
    assert "give a recipe" in capsys.readouterr().err


def test_list_names_the_recipes_and_help_is_short(capsys):
    assert main(["list"]) == 0
    listing = capsys.readouterr().out
    assert "quickstart.yaml" in listing
    assert "ner/metaxl_evograd.yaml" in listing
    assert "grids" not in listing

    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "--help-all"]) == 0
    everything = capsys.readouterr().out
    assert "--meta_learning_rate" in short
    assert "--torch_compile" not in short
    assert "--torch_compile" in everything


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "meta_trainer", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "meta-trainer")

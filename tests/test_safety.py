"""No file that is read can run code, unless the recipe says that it is trusted."""

import ast
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from meta_trainer import MetaModule, MetaTrainer, MetaTrainingArguments, MetaWeightNet
from meta_trainer.cli import main
from meta_trainer.recipe import read_recipe
from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.classifier import make_config, make_model
from meta_trainer.tasks.ner.metrics import EntityScores
from meta_trainer.tasks.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "meta_trainer").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and description of everything that could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in UNSAFE_MODULES:
            # An error may be caught.
            yield from ((node.lineno, a.name) for a in node.names if not a.name.endswith("Error"))
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, found) for found in call_findings(node))


def call_findings(call: ast.Call) -> Iterator[str]:
    keywords = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    if keywords.get("trust_remote_code") is True or keywords.get("allow_pickle") is True:
        yield ast.unparse(call)
    if isinstance(call.func, ast.Name) and call.func.id in UNSAFE_CALLS:
        yield ast.unparse(call)
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        module, name = call.func.value.id, call.func.attr
        if (module == "yaml" and name in UNSAFE_YAML) or module in UNSAFE_MODULES:
            yield ast.unparse(call)
        if module == "torch" and name == "load" and keywords.get("weights_only") is not True:
            yield ast.unparse(call)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_file_runs_what_it_reads(file):
    assert not list(findings(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f, yaml.Loader)",
        "eval(text)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_scan_finds_what_it_looks_for(code):
    assert list(findings(ast.parse(code)))


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_payload_of_these_tests_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        "!!python/object/apply:os.mkdir ['{mark}']",
        "task: ner\ndescription: !!python/object/apply:os.mkdir ['{mark}']",
        "seed: !!python/object/new:os.mkdir ['{mark}']",
    ],
)
def test_a_recipe_cannot_name_code(tmp_path, capsys, content):
    file, mark = tmp_path / "recipe.yaml", tmp_path / "ran"
    file.write_text(content.format(mark=mark))
    with pytest.raises(ValueError, match=r"is no valid YAML: could not determine a constructor .*python/object"):
        read_recipe(str(file), [])
    assert main(["train", "--config", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("key", ["meta_module", "meta_optim", "noise", "meta_lr_scheduler_type"])
def test_a_recipe_names_no_class_by_its_path(tmp_path, key):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"source_data": "generated", "target_data": "generated", key: "os.system"}))
    with pytest.raises(ValueError, match=rf"`{key}` should be (one of|among) .*'os\.system'"):
        read_recipe(str(file), [])


def test_weights_of_a_meta_module_are_no_pickle(tmp_path):
    MetaWeightNet(4).save_pretrained(tmp_path)
    for content in (pickle.dumps(Payload(tmp_path / "ran")), b"", b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors does not fit this MetaWeightNet"):
            MetaModule.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def tiny_model() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_of_a_base_model_run_nothing(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if name == "model.safetensors":
        (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    else:
        torch.save({"classifier.weight": Payload(tmp_path / "ran")}, tmp_path / name)
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="No weights can be loaded from"):
        make_model(AutoModelForSequenceClassification, arguments, AutoConfig.from_pretrained(tmp_path), seed=0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["meta_state.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_states_in_a_checkpoint_run_nothing(tmp_path, name):
    rows = [{"input_ids": torch.arange(4), "labels": i % 2} for i in range(4)]

    def trainer() -> MetaTrainer:
        args = MetaTrainingArguments(
            str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2
        )
        return MetaTrainer(tiny_model(), args, meta_module=MetaWeightNet(4), train_dataset=rows, meta_dataset=rows)

    trainer().train()
    torch.save({"optimizer": Payload(tmp_path / "ran")}, tmp_path / "checkpoint-1" / name)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "ran").exists()


def folder_with_code(folder: Path) -> Path:
    """A model folder as on the Hub, whose config is a class of its own."""
    tiny_model().save_pretrained(folder)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(
        "import os\nfrom transformers import BertConfig\n"
        f"os.makedirs({str(folder / 'ran')!r}, exist_ok=True)\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
    )
    return folder


def test_code_of_a_model_runs_only_where_the_recipe_trusts_it(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = folder_with_code(tmp_path / "model")
    for arguments in (ModelArguments(str(folder)), ModelArguments(str(folder), trust_remote_code=False)):
        assert arguments.trust_remote_code is False
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_tokenizer(str(folder), arguments)
        with pytest.raises(ValueError, match="trust_remote_code"):
            make_config(arguments, ["a", "b"], tokenizer=None)  # type: ignore[arg-type]
    assert not (folder / "ran").exists()
    make_config(ModelArguments(str(folder), trust_remote_code=True), ["a", "b"], tokenizer=None)  # type: ignore[arg-type]
    assert (folder / "ran").exists()


def test_a_recipe_asks_for_trust_by_its_key(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("source_data: generated\ntarget_data: generated\nuse_cpu: true\n")
    assert read_recipe(str(file), []).model.trust_remote_code is False
    assert read_recipe(str(file), ["--trust_remote_code", "true"]).model.trust_remote_code is True


def test_a_metric_runs_only_where_the_recipe_trusts_it(tmp_path):
    script = tmp_path / "own_metric.py"
    script.write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(ValueError, match=r"own_metric\.py would run as a script, .* Set trust_remote_code"):
        EntityScores(["O"], [str(script)])
    assert not (tmp_path / "ran").exists()

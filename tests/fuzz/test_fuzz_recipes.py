"""Recipe files and command lines, whatever they hold."""

import contextlib
import io
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import LONGEST_MESSAGE, REFUSED, attempt, cases, restored_environment
from transformers import TrainingArguments
from values import plain, scalars, texts

from meta_trainer import MetaTrainingArguments
from meta_trainer.cli import main
from meta_trainer.recipe import META_MODULES, MetaModuleArguments, Recipe, RunArguments, read_recipe
from meta_trainer.settings_parser import COMMON_TRAINING_FIELDS
from meta_trainer.tasks import ModelArguments
from meta_trainer.tasks.image_classification import ImageClassificationArguments
from meta_trainer.tasks.language_modeling import LanguageModelingArguments
from meta_trainer.tasks.ner import NerArguments
from meta_trainer.tasks.noisy_ner import NoisyNerArguments
from meta_trainer.tasks.text_classification import TextClassificationArguments

SOUND = {
    "ner": {"task": "ner", "source_data": "generated", "target_data": "generated"},
    "noisy_ner": {"task": "noisy_ner", "data": "generated"},
    "text_classification": {"task": "text_classification", "data": "generated"},
    "image_classification": {"task": "image_classification", "data": "ylecun/mnist"},
    "language_modeling": {"task": "language_modeling", "sources": ["a=generated", "b=generated"]},
}
OURS = (
    RunArguments,
    NerArguments,
    NoisyNerArguments,
    TextClassificationArguments,
    ImageClassificationArguments,
    LanguageModelingArguments,
    ModelArguments,
    MetaModuleArguments,
)
OUR_KEYS = sorted(
    {f.name for kind in OURS for f in fields(kind)}
    | ({f.name for f in fields(MetaTrainingArguments)} - {f.name for f in fields(TrainingArguments)})
)
KEYS = [*OUR_KEYS, *sorted(COMMON_TRAINING_FIELDS)]
ALL_KEYS = [*KEYS, *sorted(f.name for f in fields(TrainingArguments))]

NASTY = (
    "!!python/object/apply:os.system ['touch {marker}']",
    "description: !!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:pathlib.Path [{marker}]",
    "seed: !!python/name:os.getpid",
    "!!python/module:os",
    "description: !meta_trainer.trainer.MetaTrainer {{}}",
    "description: &a [*a]",
    "? [a, b]\n: 1",
    "? {{a: b}}\n: 1",
    "1: 2",
    "null: 2",
    "true: 2",
    "2026-13-45: 1",
    "seed: 2026-13-45",
    "description: 2026-11-21",
    "seed: !!int x",
    "sigma: !!float x",
    "seed: !!binary AAAA",
    "seed: !!set {{1, 2}}",
    "seed: !!omap [a: 1]",
    "seed: 1\nseed: 2",
    "seed: 0o7\nsigma: 1_000.0",
    "sigma: 1:30",
    "<<: *nothing",
    "<<: 3",
    "--- a\n--- b",
    "%YAML 3.0\n---\nseed: 1",
    "seed: \"\\ud800\"",
    "[" * 3000,
    "a: " + "{{" * 3000,
    "\u0000",
    "\ufeffseed: 1",
    "seed: 1\n\tsigma: 2",
    "a: &x [1,1]\nb: &y [*x,*x,*x,*x]\nperturb: [*y,*y,*y,*y]",
    "source_subset: no",
    "description: =",
    "description: " + "long " * 100_000,
    "unknown_" * 10_000 + ": 1",
    "perturb: [" + "'x', " * 20_000 + "]",
)  # fmt: skip


def read(folder: Path, content: bytes, overrides: list[str]) -> Any:
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    return attempt(lambda: read_recipe(str(file), overrides))


def check_sound(folder: Path, recipe: Recipe) -> None:
    """What was not refused is written down in full: its settings are a recipe that reads back as the same one."""
    again = read(folder, yaml.safe_dump(recipe.settings, allow_unicode=True).encode(), [])
    assert again is not REFUSED
    assert again.settings == recipe.settings
    for part in (recipe.run, recipe.task, recipe.model, recipe.module):
        for field in fields(part):
            value = getattr(part, field.name)
            assert value is None or isinstance(value, bool | int | float | str | list), (field.name, value)


settings_of = st.dictionaries(st.sampled_from(KEYS), plain, max_size=3)


@cases(200)
@given(task=st.sampled_from(sorted(SOUND)), strange=settings_of)
def test_settings_are_a_sound_recipe_or_refused(folder, task, strange):
    content = yaml.safe_dump({**SOUND[task], "use_cpu": True, **strange}, allow_unicode=True)
    recipe = read(folder, content.encode(), [])
    if recipe is not REFUSED:
        check_sound(folder, recipe)


@cases(60)
@given(strange=st.dictionaries(st.one_of(st.sampled_from(ALL_KEYS), scalars), st.one_of(scalars, plain), max_size=4))
def test_any_mapping_is_a_recipe_or_refused(folder, strange):
    read(folder, yaml.safe_dump({**SOUND["ner"], **strange}, allow_unicode=True).encode(), [])


@cases(100)
@given(
    content=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")))
)
def test_garbage_is_refused(folder, content):
    read(folder, content, [])


@pytest.mark.parametrize("text", NASTY)
def test_tags_anchors_and_odd_scalars_are_read_as_data_or_refused(folder, text):
    marker = folder / "marker"
    read(folder, text.format(marker=marker).encode("utf-8", "surrogatepass"), [])
    assert not marker.exists()


words = st.lists(
    st.one_of(
        st.sampled_from(KEYS).map("--{}".format), st.sampled_from(ALL_KEYS).map("--{}".format), texts, scalars.map(str)
    ),
    max_size=5,
)


@cases(120)
@given(task=st.sampled_from(sorted(SOUND)), words=words)
def test_a_command_line_is_a_sound_recipe_or_refused(folder, task, words):
    recipe = read(folder, yaml.safe_dump({**SOUND[task], "use_cpu": True}).encode(), words)
    if recipe is not REFUSED:
        check_sound(folder, recipe)


@cases(70)
@given(strange=settings_of, words=words)
@example(strange={1: 2}, words=[])
@example(strange={}, words=["--config", "/dev/null/x"])
def test_the_command_line_ends_in_success_or_one_message(folder, strange, words):
    file = folder / "main.yaml"
    file.write_text(yaml.safe_dump({**SOUND["ner"], **strange}, allow_unicode=True), encoding="utf-8")
    # A "--help" or "--version" among the words prints and leaves.
    words = [word for word in words if not word.startswith(("-h", "--h", "--v"))]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch("meta_trainer.run.prepare", return_value=[]),
        mock.patch("meta_trainer.run.run", return_value=[]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        restored_environment(),
    ):
        code = main(["train", "--config", str(file), *words])
    assert code in (0, 2)
    message = err.getvalue()
    assert "Traceback" not in message
    if code == 2:
        assert message.startswith("meta-trainer: error: ")
        assert message.count("meta-trainer: error: ") == 1
        assert len(message) <= LONGEST_MESSAGE + 100


@pytest.mark.parametrize("name", META_MODULES)
@pytest.mark.parametrize("layers", [["²"], ["٣"], ["-"], ["--1"], ["1.5"], [""], [1], [-1]])
def test_layers_are_numbers_or_names(folder, name, layers):
    recipe = read(folder, yaml.safe_dump({**SOUND["ner"], "meta_module": name, "rtn_layers": layers}).encode(), [])
    if recipe is not REFUSED:
        assert all(isinstance(layer, int | str) for layer in recipe.module.layers)

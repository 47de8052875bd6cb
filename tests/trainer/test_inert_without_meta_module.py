"""Without a meta module MetaTrainer is Trainer; with one that does nothing, the base steps are Trainer's."""

from pathlib import Path

import pytest
import torch
from tiny import (
    NUM_TRAIN,
    IdentityModule,
    MeanLoss,
    PointClassifier,
    arguments,
    batch_of,
    losses_only,
    meta_trainer,
    plain_trainer,
    same,
    sentences,
    snapshot,
    tiny_bert,
    training_logs,
    weight_net,
)
from transformers import Trainer, TrainingArguments

from meta_trainer import MetaModuleList, MetaTrainer, MetaTrainingArguments


def trained(folder, kind=Trainer, arguments_kind=TrainingArguments, **settings):
    args = arguments(
        folder,
        arguments_kind,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        **settings,
    )
    collator = None
    trainer = kind(tiny_bert(), args, collator, sentences(NUM_TRAIN, 1), sentences(8, 4))
    trainer.train()
    trainer.save_model()
    return trainer


def training_losses(trainer):
    return [log["loss"] for log in training_logs(trainer)]


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("arguments_kind", "settings"),
    [
        (TrainingArguments, {}),
        (MetaTrainingArguments, {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}),
    ],
)
def test_without_a_meta_module_it_is_trainer_bit_for_bit(tmp_path, arguments_kind, settings):
    expected = trained(tmp_path / "expected", **settings)
    found = trained(tmp_path / "found", MetaTrainer, arguments_kind, **settings)

    assert losses_only(found.state.log_history) == losses_only(expected.state.log_history)
    assert same(snapshot(found.model), snapshot(expected.model))
    assert files(tmp_path / "found") == files(tmp_path / "expected")
    weights = [file for file in files(tmp_path / "found") if file.endswith("model.safetensors")]
    assert len(weights) == 3
    for file in weights:
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_without_a_meta_module_the_model_card_is_trainers(tmp_path):
    for name, kind in (("expected", Trainer), ("found", MetaTrainer)):
        trainer = kind(tiny_bert(), arguments(tmp_path / name, TrainingArguments))
        (tmp_path / name).mkdir(exist_ok=True)
        trainer.create_model_card(model_name="tiny")
    assert (tmp_path / "found/README.md").read_text() == (tmp_path / "expected/README.md").read_text()


def test_a_meta_dataset_without_a_meta_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without a `meta_module`"):
        MetaTrainer(tiny_bert(), arguments(tmp_path), meta_dataset=sentences(4, 2))


def test_a_meta_step_without_a_meta_module_is_refused(tmp_path):
    trainer = MetaTrainer(tiny_bert(), arguments(tmp_path))
    with pytest.raises(ValueError, match="needs a `meta_module`"):
        trainer.meta_step(trainer.model, batch_of(sentences(4, 1)))


@pytest.fixture(scope="module")
def of_trainer(tmp_path_factory):
    """Trainer after a run, by the number of accumulation steps."""
    runs = {}
    for steps in (1, 2):
        runs[steps] = plain_trainer(tmp_path_factory.mktemp("run"), gradient_accumulation_steps=steps)
        runs[steps].train()
    return runs


@pytest.mark.parametrize(
    ("hypergradient", "perturb", "accumulation", "rate"),
    [
        ("evograd", "all", 1, 0.7),
        ("evograd", "head", 2, 1e-6),
        ("t1t2", "all", 1, 0.7),
        ("finite_difference", "all", 2, 0.7),
    ],
)
def test_a_module_that_does_nothing_leaves_the_base_steps_of_trainer_bit_for_bit(
    tmp_path, of_trainer, hypergradient, perturb, accumulation, rate
):
    expected = of_trainer[accumulation]
    # The meta step has a rate, dropout and draws of its own, none of which may show.
    found = meta_trainer(
        tmp_path,
        IdentityModule(),
        hypergradient=hypergradient,
        perturb=perturb,
        meta_learning_rate=rate,
        gradient_accumulation_steps=accumulation,
    )
    found.train()

    assert found._num_meta_steps == 4
    assert same(snapshot(found.model), snapshot(expected.model))
    assert training_losses(found) == training_losses(expected)


def test_a_meta_step_leaves_running_statistics_to_the_base_step(tmp_path):
    expected = plain_trainer(tmp_path, PointClassifier())
    expected.train()
    found = meta_trainer(tmp_path, IdentityModule(), PointClassifier())
    found.train()
    assert same(snapshot(found.model), snapshot(expected.model))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_at_the_loss_door_is_the_loss_of_trainer(tmp_path, smoothing):
    expected = plain_trainer(tmp_path, label_smoothing_factor=smoothing)
    expected.train()
    found = meta_trainer(tmp_path, MeanLoss(), label_smoothing_factor=smoothing)
    found.train()
    torch.testing.assert_close(snapshot(found.model), snapshot(expected.model), rtol=1e-5, atol=1e-6)
    assert training_losses(found) == pytest.approx(training_losses(expected), abs=1e-6)


def test_plain_training_arguments_get_the_defaults_of_the_meta_settings(tmp_path):
    plain = arguments(tmp_path, TrainingArguments)
    trainer = MetaTrainer(
        tiny_bert(),
        plain,
        meta_module=weight_net(),
        train_dataset=sentences(NUM_TRAIN, 1),
        meta_dataset=sentences(7, 2),
    )
    before = snapshot(trainer.meta_module)
    trainer.train()
    assert isinstance(trainer.args, MetaTrainingArguments)
    assert trainer.args.num_candidates == 2
    assert trainer.args.max_steps == plain.max_steps
    assert not same(snapshot(trainer.meta_module), before)


def test_without_arguments_it_takes_those_of_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = MetaTrainer(tiny_bert(), meta_module=weight_net(), meta_dataset=sentences(4, 2))
    assert trainer.args.output_dir == Trainer(tiny_bert()).args.output_dir
    assert trainer.args.hypergradient == "evograd"


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_model_without_config_trains(tmp_path, as_tuple):
    trainer = meta_trainer(tmp_path, model=PointClassifier(as_tuple=as_tuple))
    before = snapshot(trainer.meta_module)
    trainer.train()
    assert trainer.state.global_step == 4
    assert not same(snapshot(trainer.meta_module), before)


def test_a_list_of_meta_modules_is_composed(tmp_path):
    trainer = meta_trainer(tmp_path, [weight_net(), IdentityModule()])
    assert isinstance(trainer.meta_module, MetaModuleList)
    before = snapshot(trainer.meta_module)
    trainer.train()
    assert not same(snapshot(trainer.meta_module), before)


def test_bf16_autocast_trains_both(tmp_path):
    trainer = meta_trainer(tmp_path, bf16=True)
    theta, lam = snapshot(trainer.model), snapshot(trainer.meta_module)
    trainer.train()
    assert not same(snapshot(trainer.model), theta)
    assert not same(snapshot(trainer.meta_module), lam)
    assert all(log["meta/skipped"] == 0 for log in training_logs(trainer))

"""Label smoothing and `compute_loss_func`: the base step and the meta step see the same loss."""

import pytest
import torch
from tiny import (
    HiddenShift,
    IdentityModule,
    MeanLoss,
    PointClassifier,
    Recorder,
    batch_of,
    examples_for,
    meta_trainer,
    plain_trainer,
    tiny_bert,
    training_logs,
)
from torch.nn import functional as F

SMOOTHING = {"label_smoothing_factor": 0.3}


def cubed(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, reduction="none").pow(3).mean()


def cubed_each(outputs, labels):
    return F.cross_entropy(outputs["logits"], labels, reduction="none").pow(3)


@pytest.mark.parametrize("module", [IdentityModule, MeanLoss])
@pytest.mark.parametrize(
    ("kind", "model"),
    # With label smoothing, Trainer asks a model for its config.
    [("label smoothing", tiny_bert), ("a loss function", tiny_bert), ("a loss function", PointClassifier)],
)
def test_the_base_steps_loss_is_trainers(tmp_path, kind, module, model):
    settings, keywords, own = SMOOTHING, {}, {}
    if kind == "a loss function":
        settings, keywords, own = {}, {"compute_loss_func": cubed}, {"per_example_loss": cubed_each}
    plain = plain_trainer(tmp_path, model(), logging_steps=1, **settings)
    plain.compute_loss_func = keywords.get("compute_loss_func")
    plain.train()
    trainer = meta_trainer(
        tmp_path,
        module(),
        model(),
        keywords={**keywords, **(own if module is MeanLoss else {})},
        logging_steps=1,
        **settings,
    )
    trainer.train()
    found, expected = ([log["loss"] for log in training_logs(t)] for t in (trainer, plain))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("module", [HiddenShift, MeanLoss])
@pytest.mark.parametrize("kind", ["label smoothing", "a loss function", "the model's own"])
def test_both_losses_of_a_meta_step_are_that_of_the_base_step(tmp_path, kind, module):
    settings, keywords = {}, {}
    if kind == "label smoothing":
        settings = SMOOTHING
    elif kind == "a loss function":
        keywords = {"compute_loss_func": cubed, "per_example_loss": cubed_each}
    model, meta_module = tiny_bert(dropout=0.0), module()
    for parameter in meta_module.parameters():
        parameter.data.zero_()
    trainer = meta_trainer(
        tmp_path, meta_module, model, kind=Recorder, keywords=keywords, hypergradient="t1t2", **settings
    )
    batch = batch_of(examples_for(model, 4, 5))
    base = trainer.compute_loss(trainer.model, dict(batch)).detach()
    # An inner step of length zero.
    trainer.args.learning_rate = 1e-12
    result = trainer.meta_step(trainer.model, {**batch, "meta_batch": batch})
    torch.testing.assert_close(result.train_losses[0], base)
    torch.testing.assert_close(result.val_loss, base)
    logits = model(**batch).logits
    plain = F.cross_entropy(logits, batch["labels"])
    assert (abs(float((base - plain).detach())) > 1e-6) == (kind != "the model's own")


def test_smoothing_and_accumulation_go_together(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 1, **SMOOTHING}
    plain = plain_trainer(tmp_path, **settings)
    plain.train()
    trainer = meta_trainer(tmp_path, MeanLoss(), **settings)
    trainer.train()
    found, expected = ([log["loss"] for log in training_logs(t)] for t in (trainer, plain))
    assert found == pytest.approx(expected, rel=1e-5)

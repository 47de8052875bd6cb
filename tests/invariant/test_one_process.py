"""Runs on one process that have to come out the same."""

import math

import pytest
import torch
from runs import ESTIMATORS, EXACT, ROUNDING, SINGLE, assert_same_run, moved, new_run, report
from transformers import Trainer

from meta_trainer import MetaTrainer


def trained(folder, **settings):
    trainer = new_run(folder, **settings)
    before = report(trainer)
    trainer.train()
    after = report(trainer)
    return trainer, before, after


@pytest.mark.parametrize(
    "settings",
    [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, {"stream": True}, {"decoder": True}],
    ids=["plain", "accumulated", "stream", "decoder"],
)
def test_without_a_meta_module_it_is_trainer(tmp_path, settings):
    settings = {"module": None, "dropout": 0.1, "mean_over_batch": False, **settings}
    _, _, expected = trained(tmp_path / "expected", kind=Trainer, **settings)
    _, _, found = trained(tmp_path / "found", kind=MetaTrainer, **settings)
    assert_same_run(found, expected, **EXACT)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("mean_loss", {}),
        ("mean_loss", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
        ("identity", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "mean_over_batch": False}),
        ("identity", {"meta_every": 2, "stream": True}),
        ("identity", {"decoder": True}),
    ],
    ids=["mean loss", "mean loss accumulated", "identity accumulated", "stream", "decoder"],
)
def test_a_meta_step_that_changes_nothing_leaves_trainers_run(tmp_path, estimator, module, settings):
    """With dropout: no trace on parameters, gradients or random numbers."""
    settings = {"dropout": 0.1, "max_steps": 3, **settings}
    _, _, expected = trained(tmp_path / "expected", module=None, kind=Trainer, **settings)
    trainer, _, found = trained(
        tmp_path / "found", module=module, estimator=estimator, meta_learning_rate=0.0, **settings
    )
    assert trainer._num_meta_steps == math.ceil(3 / settings.get("meta_every", 1))
    found["lambda"] = {}
    del found["meta_loss"]
    assert_same_run(found, expected, **EXACT)


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("module", "perturb"),
    [
        ("weight_net", "head"),
        ("hidden_shift", "head"),
        ("both", "all"),
        ("domain_weights", "head"),
        ("weight_decay", "all"),
    ],
)
def test_eight_micro_batches_are_one_batch(tmp_path, estimator, module, perturb):
    settings = {"module": module, "estimator": estimator, "perturb": [perturb], "max_steps": 3}
    _, before, expected = trained(tmp_path / "one", **settings)
    _, _, found = trained(tmp_path / "eight", **ACCUMULATED, **settings)
    assert moved(before["lambda"], expected["lambda"]) > 1e-3
    assert_same_run(found, expected, **ROUNDING)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("module", ["weight_net", "domain_weights"])
def test_eight_micro_batches_of_differing_numbers_of_tokens_are_one_batch(tmp_path, estimator, module):
    settings = {"module": module, "decoder": True, "estimator": estimator, "max_steps": 3}
    _, before, expected = trained(tmp_path / "one", **settings)
    _, _, found = trained(tmp_path / "eight", **ACCUMULATED, **settings)
    assert moved(before["lambda"], expected["lambda"]) > 1e-3
    assert_same_run(found, expected, **SINGLE)


def test_the_last_window_of_an_epoch_may_be_short(tmp_path):
    """Twelve batches of four: five, five and two micro-batches to a step."""
    short = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 5, "max_steps": 3}
    trainer = new_run(tmp_path, module="hidden_shift", **short)
    sizes = []
    meta_step = trainer.meta_step
    trainer.meta_step = lambda model, inputs: sizes.append(len(trainer._window.batches)) or meta_step(model, inputs)
    trainer.train()
    assert sizes == [5, 5, 2]


@pytest.mark.parametrize("module", ["weight_net", "hidden_shift"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("inflated", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_meta_step_sees_the_loss_of_the_base_step(tmp_path, module, accumulation, inflated, smoothing):
    """Also where Trainer sums the means of micro-batches, as it does for heads that ignore `num_items_in_batch`."""
    trainer = new_run(
        tmp_path,
        module=module,
        estimator="t1t2",
        mean_over_batch=not inflated,
        max_steps=1,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        meta_learning_rate=0.0,
        label_smoothing_factor=smoothing,
    )
    seen = []
    meta_step = trainer.meta_step
    trainer.meta_step = lambda *args: seen.append(meta_step(*args)) or seen[-1]
    trainer.train()
    base_loss = trainer.state.log_history[0]["loss"]
    assert seen[0].train_losses.item() == pytest.approx(base_loss, rel=1e-6)
    trainer_sums = inflated and module == "hidden_shift" and smoothing == 0
    assert base_loss == pytest.approx(0.7 * (accumulation if trainer_sums else 1), rel=0.3) or module == "weight_net"


def test_random_numbers_of_the_micro_batches_are_those_of_the_base_step(tmp_path):
    """Dropout included, t1t2's training loss is what the base step then sees."""
    trainer = new_run(
        tmp_path,
        module="hidden_shift",
        estimator="t1t2",
        dropout=0.3,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        meta_learning_rate=0.0,
    )
    seen = []
    meta_step = trainer.meta_step
    trainer.meta_step = lambda *args: seen.append(meta_step(*args)) or seen[-1]
    trainer.train()
    assert seen[0].train_losses.item() == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)


def test_weights_that_are_all_zero_train_nothing_and_break_nothing(tmp_path):
    trainer = new_run(tmp_path, module="weight_net", max_steps=2, max_grad_norm=0.0, weight_decay=0.0, **ACCUMULATED)
    with torch.no_grad():
        trainer.meta_module.members[0].network[2].bias.fill_(-1e4)
    before = report(trainer)
    trainer.train()
    assert trainer._skipped.in_all == 2
    assert moved(before["theta"], report(trainer)["theta"]) == 0


@pytest.mark.parametrize("module", ["weight_net", "both"])
def test_a_subclass_may_change_the_batches_of_an_accumulated_step(tmp_path, module):
    """The base step is that of the batches that it gets; the meta step looks at the first of them."""

    class Copies(MetaTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, dict(inputs), num_items_in_batch)

    settings = {"module": module, "meta_learning_rate": 0.0, "max_steps": 3, **ACCUMULATED}
    _, _, expected = trained(tmp_path / "expected", **settings)
    trainer, _, found = trained(tmp_path / "found", kind=Copies, **settings)
    assert trainer._num_meta_steps == 3
    del found["meta_loss"]
    assert_same_run(found, expected, **EXACT)


def test_counting_the_labels_of_a_meta_batch_begins_no_optimizer_step(tmp_path):
    trainer = new_run(tmp_path, decoder=True)
    window = trainer._window
    batch = {"input_ids": torch.ones(2, 4).long(), "labels": torch.tensor([[1, 2, -100, 3], [-100, -100, 4, 5]])}
    # The first label of each row has no prediction.
    assert trainer._num_items(batch) == 4
    assert trainer._window is window


@pytest.mark.parametrize("mean_over_batch", [False, True])
def test_a_release_of_trainer_that_divides_the_loss_by_a_rule_of_its_own(tmp_path, monkeypatch, mean_over_batch):
    """As those before `loss_is_scaled_for_ga`: it looks at the model and at the number of items only."""
    settings = {"module": "weight_net", "max_steps": 2, "mean_over_batch": mean_over_batch, **ACCUMULATED}
    _, _, expected = trained(tmp_path / "new", **settings)

    class Old(MetaTrainer):
        loss_is_scaled_for_ga = property(lambda self: None, lambda self, value: None)

    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga", raising=False)
    _, _, found = trained(tmp_path / "old", kind=Old, **settings)
    assert_same_run(found, expected, **ROUNDING)

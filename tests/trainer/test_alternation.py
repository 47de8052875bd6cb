"""When a meta step is taken, and what the base step is beside it."""

import pytest
import torch
from tiny import HiddenShift, MeanLoss, Recorder, meta_trainer, same, sentences, snapshot, tiny_bert, weight_net
from torch.nn import functional as F


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("meta_every", [1, 3])
def test_one_meta_step_comes_before_the_base_step_of_every_meta_every_th_optimizer_step(
    tmp_path, accumulation, meta_every
):
    trainer = meta_trainer(
        tmp_path,
        HiddenShift(),
        kind=Recorder,
        gradient_accumulation_steps=accumulation,
        meta_every=meta_every,
        per_device_train_batch_size=2,
    )
    trainer.train()
    expected = []
    # 12 micro-batches an epoch: also the fourth step of an epoch with four per step is a whole one.
    for step in range(4):
        expected += ["meta"] * (step % meta_every == 0) + ["base"] * accumulation + ["step", step]
    assert trainer.events == expected


@pytest.mark.parametrize(("delay", "first"), [(0, 0), (2, 2), (0.25, 1), (0.3, 2), (3, 3)])
def test_the_first_meta_step_comes_after_the_delay_and_the_others_at_their_distance_from_it(tmp_path, delay, first):
    trainer = meta_trainer(tmp_path, HiddenShift(), kind=Recorder, meta_delay_steps=delay, meta_every=2, max_steps=4)
    trainer.train()
    expected = []
    for step in range(4):
        expected += ["meta"] * (step >= first and (step - first) % 2 == 0) + ["base", "step", step]
    assert trainer.events == expected


def test_the_schedule_of_the_meta_learning_rate_is_that_of_the_meta_steps_after_the_delay(tmp_path):
    trainer = meta_trainer(
        tmp_path, HiddenShift(), meta_delay_steps=2, max_steps=6, meta_lr_scheduler_type="linear", logging_steps=1
    )
    trainer.train()
    rates = [row["meta/learning_rate"] for row in trainer.state.log_history if "meta/learning_rate" in row]
    assert rates == pytest.approx([trainer.args.meta_learning_rate * share for share in (1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize("delay", [4, 10])
def test_a_delay_that_leaves_no_meta_step_is_refused(tmp_path, delay):
    trainer = meta_trainer(tmp_path, HiddenShift(), meta_delay_steps=delay, max_steps=4)
    with pytest.raises(
        ValueError, match=f"`meta_delay_steps` should be less than the 4 optimizer steps .* got {delay}"
    ):
        trainer.train()


@pytest.mark.parametrize("module", [weight_net, HiddenShift])
def test_each_step_differentiates_its_own_parameters_only(tmp_path, module):
    trainer = meta_trainer(tmp_path, module(), kind=Recorder, keywords={"train_dataset": sentences(8, 1)}, max_steps=2)
    lam = snapshot(trainer.meta_module)
    trainer.train()
    assert trainer.events == ["meta", "base", "step", 0, "meta", "base", "step", 1]
    assert not same(snapshot(trainer.meta_module), lam)
    meta_parameters = {id(p) for p in trainer.meta_parameters}
    in_base_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not meta_parameters & in_base_optimizer
    assert not meta_parameters & {id(p) for p in trainer.model.parameters()}
    assert {id(p) for group in trainer.meta_optimizer.param_groups for p in group["params"]} == meta_parameters


@pytest.mark.parametrize("given_loss_function", [False, True])
def test_accumulation_does_not_inflate_the_loss_of_the_loss_door(tmp_path, given_loss_function):
    keywords = {}
    if given_loss_function:
        keywords = {
            "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(
                outputs["logits"], labels
            ),
            "per_example_loss": lambda outputs, labels: F.cross_entropy(outputs["logits"], labels, reduction="none"),
        }
    runs = [
        meta_trainer(
            tmp_path,
            MeanLoss(),
            tiny_bert(dropout=0.0),
            keywords=keywords,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.1,
            logging_steps=1,
        )
        for accumulation in (1, 2)
    ]
    for trainer in runs:
        trainer.train()
    whole, halves = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in runs)
    assert halves == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(snapshot(runs[1].model), snapshot(runs[0].model), rtol=1e-4, atol=1e-6)

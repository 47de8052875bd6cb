"""NaN and infinity never reach the meta module or its optimizer, and too many of them end the run."""

import copy
import math

import pytest
import torch
from tiny import (
    HiddenShift,
    PointClassifier,
    batch_of,
    meta_trainer,
    points,
    same,
    snapshot,
    training_logs,
    weight_net,
)
from torch import nn

from meta_trainer.hypergrad import Hypergradient
from meta_trainer.meta_update import update_meta_module

ESTIMATIONS = {
    "sign": {},
    "normal pairs": {"noise": "normal", "antithetic": True},
    "unperturbed": {"include_unperturbed": True, "relative_sigma": True, "num_candidates": 3},
    "auto": {"temperature": "auto", "orthogonal": True},
    "guided": {"noise": "guided", "meta_trust_region": 1e-3},
    "optimizer": {"noise": "optimizer", "meta_guard": "change"},
    "guided optimizer": {
        "noise": "guided",
        "inner_step": "optimizer",
        "meta_guard": "change",
        "meta_trust_region": 1e-3,
    },
    "finite differences": {"hypergradient": "finite_difference", "meta_guard": "ascent"},
    "second order": {"hypergradient": "t1t2", "meta_guard": "ascent", "meta_trust_region": 1e-3},
}


def everything(trainer):
    state = trainer.meta_optimizer.state_dict()["state"]
    return {
        "theta": snapshot(trainer.model),
        "lambda": snapshot(trainer.meta_module),
        "state": {i: {key: value.clone() for key, value in entry.items()} for i, entry in state.items()},
    }


def spoiled(batch, value):
    features = batch["features"].clone()
    features[1, 2] = value
    return {**batch, "features": features}


@pytest.mark.parametrize("settings", ESTIMATIONS.values(), ids=ESTIMATIONS)
def test_a_meta_step_on_a_spoiled_batch_leaves_everything_as_it_was(tmp_path, settings):
    trainer = meta_trainer(
        tmp_path, model=PointClassifier(), per_device_meta_batch_size=4, meta_learning_rate=0.1, **settings
    )
    trainer.train()
    train_batch, meta_batch = batch_of(points(4, 5)), batch_of(points(4, 6))
    before = everything(trainer)
    count = 0
    for value in (math.nan, math.inf, -math.inf):
        for batches in ((spoiled(train_batch, value), meta_batch), (train_batch, spoiled(meta_batch, value))):
            trainer.meta_step(trainer.model, {**batches[0], "meta_batch": batches[1]})
            count += 1
            assert trainer._skipped.in_a_row == trainer._skipped.in_all == count
            assert same(everything(trainer), before)
    trainer.meta_step(trainer.model, {**train_batch, "meta_batch": meta_batch})
    assert (trainer._skipped.in_a_row, trainer._skipped.in_all) == (0, count)
    after = everything(trainer)
    assert same(after["theta"], before["theta"])
    assert not same(after["lambda"], before["lambda"])


def hypergradient(*grads, val_loss=1.0, train_loss=1.0):
    ones = torch.ones(2)
    return Hypergradient(
        grads=grads,
        val_loss=torch.tensor(val_loss),
        train_losses=train_loss * ones,
        weights=ones / 2,
        scores=ones,
        val_loss_change=torch.tensor(0.1),
    )


@pytest.mark.parametrize("losses", [{"val_loss": math.inf}, {"train_loss": math.nan}])
def test_a_loss_that_is_not_finite_is_a_reason_to_skip_also_where_its_hypergradient_is(tmp_path, losses):
    trainer = meta_trainer(tmp_path, HiddenShift())
    before = everything(trainer)
    trainer._update_meta_module(hypergradient(torch.ones(8), **losses))
    assert same(everything(trainer), before)
    assert trainer._skipped.in_all == 1


class Overflowing(torch.optim.SGD):
    """Its state overflows before its parameters do."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["seen"] = state.get("seen", torch.zeros(2)) + 1
            state["nested"] = [torch.full((2,), math.inf)] if parameter.grad.sum() > 1 else [torch.zeros(2)]
        self.param_groups[0]["counter"] = self.param_groups[0].get("counter", 0) + 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, Overflowing])
def test_a_step_that_overflows_is_taken_back(tmp_path, kind):
    parameter = nn.Parameter(torch.full((2,), 1e38))
    optimizer = kind([parameter], lr=1e38, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    args = meta_trainer(tmp_path, meta_max_grad_norm=0.0).args

    def update(size):
        return update_meta_module(hypergradient(torch.full((2,), size)), [], [parameter], optimizer, scaler, args)

    for first in (True, False):
        before, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
        found = update(100.0)
        assert found.skipped.endswith("hypergradient of norm 1.4e+02 leads to no finite numbers")
        assert torch.equal(parameter, before)
        assert same(optimizer.state_dict(), state)
        if first:
            assert update(0.1).skipped is None
            assert torch.isfinite(parameter).all()
            assert not torch.equal(parameter, before)


@pytest.mark.parametrize("settings", [{"meta_learning_rate": 3e37}, {"meta_optim": "sgd", "meta_learning_rate": 3e37}])
def test_a_huge_meta_learning_rate_leaves_finite_numbers(tmp_path, settings):
    trainer = meta_trainer(tmp_path, HiddenShift(), meta_max_grad_norm=0.0, max_steps=6, **settings)
    trainer.train()
    found = everything(trainer)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found["lambda"].values())
    for entry in found["state"].values():
        assert all(bool(torch.isfinite(tensor).all()) for tensor in entry.values())


def data_with_nan(*positions):
    data = points(8, 2)
    for position in positions:
        data[position]["features"] = torch.full((4,), math.nan)
    return data


def trainer_on(folder, meta_dataset, **settings):
    return meta_trainer(
        folder,
        weight_net(),
        PointClassifier(),
        keywords={"meta_dataset": meta_dataset},
        **{"max_steps": 10, "per_device_meta_batch_size": 2, "logging_steps": 1, **settings},
    )


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path):
    trainer = trainer_on(tmp_path, data_with_nan(*range(8)), meta_max_skipped=3)
    with pytest.raises(
        ValueError, match=r"3 meta steps in a row were skipped .*: the meta loss is not finite\. The model's parameters"
    ):
        trainer.train()
    assert trainer.state.global_step == 2


def test_no_number_of_skipped_steps_ends_the_run_if_there_is_no_limit(tmp_path):
    trainer = trainer_on(tmp_path, data_with_nan(*range(8)), meta_max_skipped=0)
    trainer.train()
    assert [log["meta/skipped_in_all"] for log in training_logs(trainer)] == list(range(1, 11))


def test_a_model_that_diverged_is_named_in_the_error(tmp_path):
    trainer = trainer_on(tmp_path, points(8, 2), meta_max_skipped=1)
    with torch.no_grad():
        trainer.model.head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"The model itself holds numbers that are not finite, in 'head\.weight'"):
        trainer.train()


def test_a_resumed_run_goes_on_counting(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "meta_max_skipped": 4}
    data = data_with_nan(*range(8))
    with pytest.raises(ValueError, match="4 meta steps in a row"):
        trainer_on(tmp_path, data, **settings).train()
    resumed = trainer_on(tmp_path, data, **settings)
    with pytest.raises(ValueError, match="4 meta steps in a row"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert resumed._skipped.in_all == 4


@pytest.mark.parametrize("limit", [-1, math.inf, 1.5])
def test_a_limit_that_is_no_number_of_steps_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match="`meta_max_skipped` should be"):
        meta_trainer(tmp_path, meta_max_skipped=limit)

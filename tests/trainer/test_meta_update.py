"""From the hypergradient to the new meta module: optimizer, schedule, clipping, loss scale, NaN."""

import numpy as np
import pytest
import torch
from tiny import (
    HiddenShift,
    IdentityModule,
    MeanLoss,
    PointClassifier,
    Recorder,
    batch_of,
    meta_trainer,
    plain_trainer,
    points,
    same,
    sentences,
    snapshot,
    training_logs,
)
from torch import nn

from meta_trainer.arguments import ESTIMATORS
from meta_trainer.meta_optimizer import apply_hypergradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_scale_leaves_the_update_alone_and_falls_at_an_overflow(dtype):
    """Half precision scales on accelerators; the scaler itself runs anywhere."""
    updates = []
    for enabled in (False, True):
        parameter = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        grad = torch.tensor([3.0, 0.0, 4.0])
        norm, stepped = apply_hypergradient([parameter], [grad], optimizer, scaler, max_grad_norm=1.0)
        assert stepped
        assert float(norm) == pytest.approx(5.0)
        assert grad.tolist() == [3.0, 0.0, 4.0]
        assert parameter.grad is None
        updates.append(parameter.detach().clone())

        _, stepped = apply_hypergradient([parameter], [grad * float("inf")], optimizer, scaler, 1.0)
        assert not stepped
        assert torch.equal(parameter, updates[-1])
        assert scaler.get_scale() == (512.0 if enabled else 1.0)
    torch.testing.assert_close(updates[0], torch.tensor([0.94, 1.0, 0.92], dtype=dtype))
    torch.testing.assert_close(updates[1], updates[0])


def test_the_meta_optimizer_has_its_own_name_rate_and_decay(tmp_path):
    for name, kind in (
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("adamw_torch", torch.optim.AdamW),
    ):
        trainer = meta_trainer(
            tmp_path, meta_optim=name, meta_learning_rate=0.25, meta_weight_decay=0.125, optim="adafactor"
        )
        trainer.create_optimizer()
        assert type(trainer.meta_optimizer) is kind
        (group,) = trainer.meta_optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
        assert trainer.args.learning_rate == 1e-3
        assert type(trainer.optimizer).__name__ == "Adafactor"


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 0.5, [0, 1 / 2, 1, 1 / 2]),
        ("constant_with_warmup", 3, [0, 1 / 3, 2 / 3, 1]),
    ],
)
def test_the_meta_schedule_runs_over_the_meta_steps(tmp_path, schedule, warmup, rates):
    trainer = meta_trainer(
        tmp_path,
        IdentityModule(),
        max_steps=7,
        meta_every=2,
        meta_learning_rate=0.1,
        meta_lr_scheduler_type=schedule,
        meta_warmup_steps=warmup,
        logging_steps=1,
    )
    trainer.train()
    logged = [log["meta/learning_rate"] for log in trainer.state.log_history if "meta/learning_rate" in log]
    assert logged == pytest.approx([0.1 * rate for rate in rates])


@pytest.mark.parametrize(("max_norm", "share"), [(0.0, 1.0), (1e9, 1.0), (None, 0.5)])
def test_the_hypergradient_is_clipped_to_its_norm(tmp_path, max_norm, share):
    def step(limit):
        trainer = meta_trainer(
            tmp_path,
            HiddenShift(),
            meta_optim="sgd",
            meta_learning_rate=1.0,
            meta_max_grad_norm=limit,
            hypergradient="t1t2",
            learning_rate=0.5,
        )
        before = trainer.meta_module.shift.detach().clone()
        result = trainer.meta_step(trainer.model, batch_of(sentences(4, 5)))
        return before - trainer.meta_module.shift.detach(), result.grads[0]

    _, grad = step(0.0)
    assert grad.norm() > 0
    update, _ = step(0.5 * float(grad.norm()) if max_norm is None else max_norm)
    torch.testing.assert_close(update, share * grad, rtol=1e-3, atol=1e-7)


def points_with_a_nan(number, position):
    data = points(number, 2)
    data[position]["features"] = torch.full((4,), float("nan"))
    return data


@pytest.mark.parametrize("hypergradient", ESTIMATORS)
def test_a_meta_batch_of_nan_is_skipped_and_training_goes_on(tmp_path, hypergradient):
    class Watcher(Recorder):
        def meta_step(self, model, inputs):
            before = snapshot(self.meta_module)
            states = None if self.meta_optimizer is None else self.meta_optimizer.state_dict()["state"]
            states = {i: {k: v.clone() for k, v in state.items()} for i, state in states.items()}
            result = super().meta_step(model, inputs)
            finite = all(bool(torch.isfinite(grad).all()) for grad in result.grads)
            assert same(snapshot(self.meta_module), before) is not finite
            assert same(self.meta_optimizer.state_dict()["state"], states) is not finite
            self.finite = [*getattr(self, "finite", []), finite]
            return result

    trainer = meta_trainer(
        tmp_path,
        model=PointClassifier(),
        kind=Watcher,
        keywords={"meta_dataset": points_with_a_nan(8, 1)},
        per_device_meta_batch_size=2,
        meta_lr_scheduler_type="linear",
        hypergradient=hypergradient,
        logging_steps=4,
    )
    trainer.train()
    assert trainer.finite.count(False) == 1
    assert all(bool(torch.isfinite(p).all()) for p in (*trainer.model.parameters(), *trainer.meta_parameters))
    (log,) = training_logs(trainer)
    assert log["meta/skipped"] == 0.25
    assert log["meta/loss"] == pytest.approx(
        np.mean([float(r.val_loss) for r, finite in zip(trainer.results, trainer.finite, strict=True) if finite])
    )


def test_nan_in_every_meta_batch_from_the_first_on_trains_the_model_as_trainer_does(tmp_path):
    expected = plain_trainer(tmp_path, PointClassifier())
    expected.train()
    trainer = meta_trainer(
        tmp_path,
        MeanLoss(),
        PointClassifier(),
        keywords={"meta_dataset": points_with_a_nan(4, 0)},
        logging_steps=4,
    )
    lam = snapshot(trainer.meta_module)
    trainer.train()
    torch.testing.assert_close(snapshot(trainer.model), snapshot(expected.model))
    assert same(snapshot(trainer.meta_module), lam)
    (log,) = training_logs(trainer)
    assert log["meta/skipped"] == 1
    assert "meta/loss" not in log

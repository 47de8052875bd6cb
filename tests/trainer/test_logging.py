"""The meta step's lines in the logs."""

import pytest
import torch
from tiny import PointClassifier, meta_trainer, points

from meta_trainer import MetaTrainer, MetaWeightNet
from meta_trainer.meta_metrics import MetaMetrics

NAMES = {
    f"meta/{name}"
    for name in (
        "loss", "loss_change", "loss_slope", "grad_norm", "learning_rate", "skipped", "max_candidate_weight",
        "candidate_weight_range", "effective_candidates", "loss_spread", "cosine_to_last", "signal_to_noise",
        "skipped_in_all",
    )
}  # fmt: skip


class Listener(MetaTrainer):
    results: list

    def meta_step(self, model, inputs):
        result = super().meta_step(model, inputs)
        self.results = [*getattr(self, "results", []), result]
        return result


def test_meta_metrics_are_logged_with_the_training_loss_and_nowhere_else(tmp_path, monkeypatch):
    taken = []
    take = MetaMetrics.take
    monkeypatch.setattr(MetaMetrics, "take", lambda self: taken.append(1) or take(self))
    trainer = meta_trainer(
        tmp_path,
        model=PointClassifier(),
        kind=Listener,
        keywords={"eval_dataset": points(6, 4)},
        max_steps=7,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()

    logs = trainer.state.log_history
    with_loss = [log for log in logs if "loss" in log]
    assert [log["step"] for log in with_loss] == [3, 6]
    assert all({key for key in log if key.startswith("meta/")} == NAMES for log in with_loss)
    assert not any("meta" in key for log in logs if "loss" not in log for key in log)
    assert len(taken) == 2

    for log, results in zip(with_loss, (trainer.results[:3], trainer.results[3:6]), strict=True):
        norms = [torch.stack([grad.norm() for grad in r.grads]).norm() for r in results]
        assert log["meta/loss"] == pytest.approx(float(torch.stack([r.val_loss for r in results]).mean()))
        assert log["meta/grad_norm"] == pytest.approx(float(torch.stack(norms).mean()))
        assert log["meta/max_candidate_weight"] == pytest.approx(
            float(torch.stack([r.weights.max() for r in results]).mean())
        )
        assert log["meta/learning_rate"] == pytest.approx(1e-3)
        assert log["meta/skipped"] == 0


def test_the_norm_is_logged_before_clipping(tmp_path):
    trainer = meta_trainer(tmp_path, model=PointClassifier(), kind=Listener, meta_max_grad_norm=1e-9, logging_steps=1)
    trainer.train()
    norm = torch.cat([grad.flatten() for grad in trainer.results[0].grads]).norm()
    first = trainer.state.log_history[0]
    assert first["meta/grad_norm"] == pytest.approx(float(norm))
    assert first["meta/grad_norm"] > 1e-9


def test_a_log_without_a_meta_step_since_the_last_has_no_meta_metrics(tmp_path):
    trainer = meta_trainer(tmp_path, model=PointClassifier(), meta_every=3, logging_steps=1)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "meta/loss" in log] == [1, 4]


def test_meta_metrics_average_each_name_over_its_own_values_and_start_anew():
    metrics = MetaMetrics()
    metrics.add(loss=torch.tensor(1.0), skipped=torch.tensor(0.0))
    metrics.add(skipped=torch.tensor(1.0))
    assert metrics.take() == {"meta/loss": 1.0, "meta/skipped": 0.5}
    assert metrics.take() == {}


@pytest.mark.parametrize("settings", [{"noise": "guided"}, {"hypergradient": "t1t2"}])
def test_directed_estimators_log_what_an_update_does_to_the_training_objective(tmp_path, settings):
    trainer = meta_trainer(
        tmp_path, model=PointClassifier(), kind=Listener, logging_steps=1, meta_learning_rate=0.3, **settings
    )
    trainer.train()
    changes = [log["meta/objective_change"] for log in trainer.state.log_history if "loss" in log]
    expected = [
        abs(log["loss"] / float(result.train_losses.mean()) - 1)
        for log, result in zip(trainer.state.log_history, trainer.results, strict=False)
    ]
    assert changes == pytest.approx(expected, rel=1e-2)
    assert max(changes) > 1e-3


def test_the_objective_is_not_compared_with_that_of_a_micro_batch(tmp_path):
    trainer = meta_trainer(
        tmp_path, model=PointClassifier(), noise="guided", gradient_accumulation_steps=2, logging_steps=1
    )
    trainer.train()
    assert not any("meta/objective_change" in log for log in trainer.state.log_history)


def test_what_the_meta_module_says_of_its_parameters_is_logged_with_the_training_loss(tmp_path):
    class Talkative(MetaWeightNet):
        def summary(self):
            return {"last_bias": self.network[2].bias[0]}

    trainer = meta_trainer(tmp_path, model=PointClassifier(), meta_module=Talkative(4), max_steps=2, logging_steps=1)
    trainer.train()

    *rows, last = (row for row in trainer.state.log_history if "loss" in row)
    assert len({row["meta_module/last_bias"] for row in [*rows, last]}) == 2
    assert last["meta_module/last_bias"] == trainer.meta_module.network[2].bias[0].item()

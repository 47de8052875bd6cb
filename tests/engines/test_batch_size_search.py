"""`auto_find_batch_size`: what runs out of memory is tried again with a smaller batch, also where a meta step did."""

import pytest
import torch
from tiny import PointClassifier, Recorder, meta_trainer, same, snapshot, weight_net

LIMIT = 4


class Limited(PointClassifier):
    """Runs out of memory on large batches, in the base step only, or in the meta step already."""

    def __init__(self, in_meta_step: bool) -> None:
        super().__init__()
        self.in_meta_step, self.meta_step_runs, self.sizes = in_meta_step, False, []

    def forward(self, features, labels=None):
        outputs = super().forward(features, labels)
        if self.training and self.meta_step_runs <= self.in_meta_step and len(features) > LIMIT:
            self.sizes.append(len(features))
            raise RuntimeError("CUDA out of memory.")
        return outputs


class Searching(Recorder):
    """Tells the model where it is, and looks at what an error leaves behind."""

    def meta_step(self, model, inputs):
        before, modes = snapshot(self.model), [module.training for module in self.model.modules()]
        random_state = torch.random.get_rng_state()
        self.model.meta_step_runs = True
        try:
            return super().meta_step(model, inputs)
        except RuntimeError:
            assert same(snapshot(self.model), before)
            assert [module.training for module in self.model.modules()] == modes
            assert torch.equal(torch.random.get_rng_state(), random_state)
            assert all(p.grad is None for p in (*self.model.parameters(), *self.meta_module.parameters()))
            raise
        finally:
            self.model.meta_step_runs = False


SETTINGS = {
    "per_device_train_batch_size": 6,
    "per_device_meta_batch_size": 3,
    "auto_find_batch_size": True,
    "meta_lr_scheduler_type": "linear",
    "meta_learning_rate": 0.05,
    "logging_steps": 1,
}


def run(folder, in_meta_step, resume=None, seed=0, **settings):
    trainer = meta_trainer(folder, weight_net(seed), Limited(in_meta_step), kind=Searching, **{**SETTINGS, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("in_meta_step", "hypergradient"),
    [(True, "evograd"), (True, "finite_difference"), (True, "t1t2"), (False, "evograd")],
)
def test_a_run_goes_on_with_a_smaller_batch(tmp_path, in_meta_step, hypergradient):
    trainer = run(tmp_path, in_meta_step, hypergradient=hypergradient)
    assert trainer.model.sizes == [6, 5]
    assert trainer.state.train_batch_size == LIMIT
    # Every one of the four steps has its meta step; where the base step failed, there are the failed ones' besides.
    assert trainer.state.global_step == 4
    assert trainer._num_meta_steps == (4 if in_meta_step else 6)
    # The schedule starts anew with each attempt.
    assert trainer.meta_lr_scheduler.last_epoch == 4
    rates = [log["meta/learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    assert not same(snapshot(trainer.meta_module), snapshot(weight_net()))


def test_a_run_with_the_size_that_was_found_is_resumed_bit_for_bit(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    straight = run(tmp_path, in_meta_step=True, **settings)
    resumed = run(tmp_path / "resumed", in_meta_step=True, resume=str(tmp_path / "checkpoint-2"), seed=5, **settings)
    assert resumed.model.sizes == []
    assert same(snapshot(resumed.model), snapshot(straight.model))
    assert same(snapshot(resumed.meta_module), snapshot(straight.meta_module))
    assert resumed._num_meta_steps == straight._num_meta_steps


def test_an_error_that_is_not_about_memory_ends_the_run(tmp_path, monkeypatch):
    trainer = meta_trainer(tmp_path, model=PointClassifier(), **SETTINGS)

    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(trainer, "_estimate", broken)
    with pytest.raises(ValueError, match="The first meta step failed with RuntimeError: something else"):
        trainer.train()

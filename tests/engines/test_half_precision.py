"""bf16 and fp16: the passes are coarse, the meta module and its update are not."""

import pytest
import torch
from tiny import HiddenShift, Recorder, meta_trainer, same, snapshot, weight_net

ESTIMATORS = {
    "evograd": {},
    "guided": {"noise": "guided"},
    "finite_difference": {"hypergradient": "finite_difference"},
    "t1t2": {"hypergradient": "t1t2"},
}


def scaler_of(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


class Scaled(Recorder):
    """Has both scalers of fp16, which Trainer makes on accelerators only; some hypergradients are infinite."""

    infinite_at: tuple = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = scaler_of(2.0**12)
        self.meta_scaler = scaler_of(2.0**10)
        self.scales = []

    def _estimate(self, problem):
        result = super()._estimate(problem)
        if self._num_meta_steps in self.infinite_at:
            result.grads[0].fill_(float("inf"))
        return result

    def meta_step(self, model, inputs):
        result = super().meta_step(model, inputs)
        self.scales.append((self.meta_scaler.get_scale(), self.accelerator.scaler.get_scale()))
        return result


class InfiniteTwice(Scaled):
    infinite_at = (1, 2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hypergradients_in_bfloat16_are_finite_and_the_meta_module_stays_in_float32(tmp_path, estimator):
    trainer = meta_trainer(tmp_path, [weight_net(), HiddenShift()], kind=Recorder, bf16=True, **ESTIMATORS[estimator])
    seen = []
    trainer.model.bert.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    trainer.model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = snapshot(trainer.meta_module)
    trainer.train()
    assert torch.bfloat16 in seen
    assert len(trainer.results) == 4
    assert all(torch.isfinite(grad).all() for result in trainer.results for grad in result.grads)
    assert {grad.dtype for result in trainer.results for grad in result.grads} == {torch.float32}
    assert {p.dtype for p in trainer.meta_module.parameters()} == {torch.float32}
    assert not same(snapshot(trainer.meta_module), before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_scale_is_divided_out_exactly(tmp_path, estimator):
    """A power of two, so that not one bit may differ."""
    settings = {"max_grad_norm": 0, "meta_trust_region": 0.1, **ESTIMATORS[estimator]}
    runs = []
    for kind in (Recorder, Scaled):
        trainer = meta_trainer(tmp_path, [weight_net(), HiddenShift()], kind=kind, **settings)
        trainer.train()
        runs.append(trainer)
    plain, scaled = runs
    for left, right in zip(plain.results, scaled.results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left.grads, right.grads, strict=True))
        assert any(grad.abs().max() > 0 for grad in left.grads)
    assert same(snapshot(plain.meta_module), snapshot(scaled.meta_module))
    assert same(snapshot(plain.model), snapshot(scaled.model))
    assert scaled.scales == [(2.0**10, 2.0**12)] * 4


def test_an_infinite_hypergradient_halves_the_scale_of_the_meta_step_alone(tmp_path):
    trainer = meta_trainer(tmp_path, kind=InfiniteTwice, max_steps=4)
    lam, after = snapshot(trainer.meta_module), []
    update = trainer._update_meta_module
    trainer._update_meta_module = lambda result: (update(result), after.append(snapshot(trainer.meta_module)))
    trainer.train()
    assert trainer.scales == [(2.0**10, 2.0**12), (2.0**9, 2.0**12), (2.0**8, 2.0**12), (2.0**8, 2.0**12)]
    assert [same(left, right) for left, right in zip([lam, *after], after, strict=False)] == [False, True, True, False]
    # The base schedule takes every step.
    assert trainer.lr_scheduler.last_epoch == 4


def test_the_scale_goes_on_from_a_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    meta_trainer(tmp_path, kind=InfiniteTwice, **settings).train()
    resumed = meta_trainer(tmp_path, weight_net(5), kind=Scaled, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [scale for scale, _ in resumed.scales] == [2.0**9, 2.0**9]

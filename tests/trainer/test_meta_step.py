"""One meta step: what it computes, and what it leaves alone."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import (
    HiddenShift,
    MeanLoss,
    PointClassifier,
    batch_of,
    meta_trainer,
    points,
    same,
    sentences,
    snapshot,
    tiny_bert,
    weight_net,
)
from torch import nn
from torch.nn import functional as F

from meta_trainer.arguments import ESTIMATORS
from meta_trainer.hypergrad import BilevelProblem, Hypergradient, evograd, finite_difference, t1t2


def random_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("hypergradient", ESTIMATORS)
@pytest.mark.parametrize("perturb", ["all", ["head.*"]])
def test_a_meta_step_changes_the_meta_module_and_nothing_else(tmp_path, hypergradient, perturb):
    trainer = meta_trainer(tmp_path, model=PointClassifier(), hypergradient=hypergradient, perturb=perturb)
    model, batch = trainer.model, batch_of(points(8, 5))
    model.train()
    model.body[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.body[0].bias.requires_grad_(False)
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    theta, lam, drawn, mode = snapshot(model), snapshot(trainer.meta_module), random_state(), modes(model)
    given = {key: value.clone() for key, value in batch.items()}

    result = trainer.meta_step(model, batch)

    assert isinstance(result, Hypergradient)
    assert [g.shape for g in result.grads] == [p.shape for p in trainer.meta_parameters]
    assert not same(snapshot(trainer.meta_module), lam)
    assert same(snapshot(model), theta)
    assert random_state() == drawn
    assert modes(model) == mode
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(p.grad is None and p.requires_grad for p in trainer.meta_parameters)
    assert same(batch, given)


@pytest.mark.parametrize("failing_pass", [0, 1, 2, 3])
def test_a_failing_meta_step_leaves_no_trace(tmp_path, failing_pass):
    # The unperturbed losses, two candidates and the meta loss.
    trainer = meta_trainer(tmp_path, weight_net(loss_input="unperturbed"), PointClassifier())
    model, passes = trainer.model, iter(range(4))
    whole_forward = model.forward

    def forward(**inputs):
        outputs = whole_forward(**inputs)
        if next(passes) == failing_pass:
            raise FloatingPointError("in the middle")
        return outputs

    model.forward = forward
    model.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    theta, lam, drawn = snapshot(model), snapshot(trainer.meta_module), random_state()

    with pytest.raises(FloatingPointError, match="in the middle"):
        trainer.meta_step(model, batch_of(points(8, 5)))

    assert same(snapshot(model), theta)
    assert same(snapshot(trainer.meta_module), lam)
    assert random_state() == drawn
    assert not any(modes(model))
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(p.grad is None and p.requires_grad for p in trainer.meta_parameters)
    model.forward = whole_forward
    assert trainer.evaluate(points(4, 6))["eval_loss"] > 0


def independent_problem(model, net, batch, meta_batch, loss_input):
    """Meta-Weight-Net's problem, written without the trainer; dropout is drawn from the present state."""

    def losses(inputs):
        logits = model(input_ids=inputs["input_ids"]).logits
        return F.cross_entropy(logits, inputs["labels"], reduction="none")

    state, seen = torch.random.get_rng_state(), []
    if loss_input == "unperturbed":
        with torch.no_grad():
            seen.append(losses(batch))
        torch.random.set_rng_state(state)

    def train_loss():
        seen.append(losses(batch))
        weights = net.network(seen[-1 if loss_input == "candidate" else 0].detach()[:, None])[:, 0]
        return (weights * seen[-1]).sum() / weights.sum()

    return BilevelProblem(
        theta=list(model.parameters()),
        meta_params=list(net.parameters()),
        train_loss=train_loss,
        val_loss=lambda: losses(meta_batch).mean(),
    )


def spread(module):
    """Widen the initial weights, so that the hypergradient stands out from rounding errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    return module


@pytest.mark.parametrize("loss_input", ["shared", "unperturbed", "candidate"])
@pytest.mark.parametrize("hypergradient", ESTIMATORS)
def test_a_meta_step_of_meta_weight_net_equals_a_computation_by_hand(tmp_path, hypergradient, loss_input):
    batch, meta_batch = batch_of(sentences(4, 5)), batch_of(sentences(4, 6))
    settings = {"hypergradient": hypergradient, "meta_weight_decay": 0.1, "meta_learning_rate": 0.01}
    settings |= {
        "num_candidates": 3,
        "sigma": 0.02,
        "temperature": 0.1,
        "noise": "normal",
        "learning_rate": 0.3,
    }
    model, net = spread(tiny_bert()), spread(weight_net())
    trainer = meta_trainer(tmp_path, spread(weight_net(loss_input=loss_input)), spread(tiny_bert()), **settings)
    model.train()

    torch.manual_seed(11)
    problem = independent_problem(model, net, batch, meta_batch, loss_input)
    # The seed of the first meta step in a run with seed 3.
    seed = int(np.random.SeedSequence([3, 0]).generate_state(1)[0])
    expected = {
        "evograd": lambda: evograd(problem, 3, 0.02, 0.1, "normal", seed),
        "t1t2": lambda: t1t2(problem, lr=0.3),
        "finite_difference": lambda: finite_difference(problem, lr=0.3),
    }[hypergradient]()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    for parameter, grad in zip(net.parameters(), expected.grads, strict=True):
        parameter.grad = grad.clone()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()

    # Also a model that was evaluated last takes its meta step with dropout.
    trainer.model.eval()
    torch.manual_seed(11)
    found = trainer.meta_step(trainer.model, {**batch, "meta_batch": meta_batch})

    assert max(float(grad.abs().max()) for grad in expected.grads) > 1e-6
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found.train_losses, expected.train_losses)
    torch.testing.assert_close(found.val_loss, expected.val_loss)
    torch.testing.assert_close(found.weights, expected.weights)
    torch.testing.assert_close(snapshot(trainer.meta_module), snapshot(net), rtol=1e-5, atol=1e-7)


def test_every_meta_step_of_a_run_has_perturbations_of_its_own(tmp_path):
    def scores(seed):
        trainer = meta_trainer(tmp_path, MeanLoss(), tiny_bert(dropout=0.0), seed=seed)
        batch = batch_of(sentences(4, 5))
        return [trainer.meta_step(trainer.model, {**batch, "meta_batch": batch}).scores.tolist() for _ in range(2)]

    first, second = scores(seed=3)
    assert first != second
    assert scores(seed=3) == [first, second]
    assert first not in scores(seed=4)


def test_nothing_is_differentiated_outside_the_scope(tmp_path):
    trainer = meta_trainer(tmp_path, perturb="head", hypergradient="t1t2")
    needed = []
    trainer.model.classifier.register_forward_pre_hook(
        lambda module, inputs: needed.append((inputs[0].requires_grad, module.weight.requires_grad))
    )
    trainer.meta_step(trainer.model, batch_of(sentences(4, 5)))
    # The train loss and the meta loss.
    assert needed == [(False, True)] * 2
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


class WithRunningMean(HiddenShift):
    """Counts and averages what goes through its door."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    @contextmanager
    def attach(self, model, batch):
        hook = model.dropout.register_forward_pre_hook(lambda module, inputs: (self.norm(inputs[0]) + self.shift,))
        try:
            yield
        finally:
            hook.remove()


@pytest.mark.parametrize("settings", [{}, {"hypergradient": "t1t2"}, {"perturb": ["head"]}, {"noise": "guided"}])
def test_buffers_of_the_meta_module_are_those_of_the_base_step(tmp_path, settings):
    trainer = meta_trainer(tmp_path, WithRunningMean(), max_steps=3, **settings)
    trainer.meta_step(trainer.model, batch_of(sentences(4, 1)))
    assert trainer.meta_module.norm.num_batches_tracked == 0
    trainer.train()
    assert trainer.meta_module.norm.num_batches_tracked == 3
    assert trainer.meta_module.norm.running_mean.abs().max() > 0

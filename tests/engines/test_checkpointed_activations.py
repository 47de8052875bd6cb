"""Activation checkpointing: forward passes are repeated, hypergradients are the same bit for bit."""

import pytest
import torch
from tiny import HiddenShift, Recorder, meta_trainer, same, snapshot, tiny_bert, weight_net


@pytest.mark.parametrize("perturb", [["all"], ["classifier.*"]])
@pytest.mark.parametrize(
    ("hypergradient", "noise"),
    [("evograd", "sign"), ("evograd", "guided"), ("finite_difference", "sign"), ("t1t2", "sign")],
)
def test_checkpointed_activations_give_the_same_hypergradients(tmp_path, hypergradient, noise, perturb):
    runs = []
    for checkpointed in (False, True):
        trainer = meta_trainer(
            tmp_path,
            [weight_net(), HiddenShift()],
            tiny_bert(dropout=0.1),
            kind=Recorder,
            hypergradient=hypergradient,
            perturb=perturb,
            noise=noise,
            activation_checkpointing=checkpointed,
            max_steps=2,
        )
        trainer.train()
        assert trainer.model.is_activation_checkpointing is checkpointed
        runs.append((trainer.results, snapshot(trainer.meta_module), snapshot(trainer.model)))
    (plain, *ends), (repeated, *other_ends) = runs
    for left, right in zip(plain, repeated, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left.grads, right.grads, strict=True))
        assert any(grad.abs().max() > 0 for grad in left.grads)
    assert all(same(left, right) for left, right in zip(ends, other_ends, strict=True))


def test_reentrant_checkpointing_is_refused_in_the_arguments_and_in_the_model(tmp_path):
    reentrant = {"use_reentrant": True}
    with pytest.raises(ValueError, match="`activation_checkpointing_kwargs` should have use_reentrant=False"):
        meta_trainer(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=reentrant)
    model = tiny_bert()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=reentrant)
    with pytest.raises(ValueError, match="checkpointing of the model should have use_reentrant=False, got True"):
        meta_trainer(tmp_path, model=model)
    model.activation_checkpointing_enable()
    meta_trainer(tmp_path, model=model)

"""Attention: every implementation that has the derivatives works with every estimator, the others are refused."""

import sys
from contextlib import nullcontext

import pytest
import torch
from tiny import HiddenShift, Recorder, meta_trainer, tiny_bert, weight_net
from torch.nn.attention import SDPBackend

ESTIMATORS = ["evograd", "finite_difference", "t1t2"]


def bert_with(attention, dropout):
    model = tiny_bert(dropout)
    model.set_attn_implementation(attention)
    return model


def hypergradients(folder, attention, dropout, **settings):
    trainer = meta_trainer(
        folder, [weight_net(), HiddenShift()], bert_with(attention, dropout), kind=Recorder, **settings
    )
    trainer.train()
    assert trainer.model.config._attn_implementation == attention
    assert all(torch.isfinite(grad).all() for result in trainer.results for grad in result.grads)
    return [torch.cat([grad.flatten() for grad in result.grads]) for result in trainer.results]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("hypergradient", ESTIMATORS)
def test_eager_and_fused_attention_give_the_same_hypergradient(tmp_path, hypergradient, dropout):
    settings = {"hypergradient": hypergradient, "max_steps": 1}
    if hypergradient == "evograd":
        settings |= {"sigma": 0.1}  # short perturbations enlarge the difference in rounding
    (eager,) = hypergradients(tmp_path, "eager", dropout, **settings)
    (fused,) = hypergradients(tmp_path, "sdpa", dropout, **settings)
    tolerance = {"evograd": 1e-3, "finite_difference": 2e-2, "t1t2": 1e-4}[hypergradient]
    assert float((eager - fused).norm() / eager.norm()) < tolerance


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("hypergradient", ESTIMATORS)
def test_attention_in_bfloat16_has_finite_hypergradients(tmp_path, hypergradient, dropout, attention):
    found = hypergradients(tmp_path, attention, dropout, hypergradient=hypergradient, bf16=True)
    assert len(found) == 4


def test_second_derivatives_need_the_kernel_that_t1t2_chooses(tmp_path, monkeypatch):
    """Without dropout, where the fused kernel is taken otherwise."""
    chosen = []

    def left_to_torch(backend):
        chosen.append(backend)
        return nullcontext()

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["meta_trainer.hypergrad.t1t2"], "sdpa_kernel", left_to_torch)
    trainer = meta_trainer(tmp_path, model=bert_with("sdpa", 0.0), hypergradient="t1t2")
    with pytest.raises(ValueError, match=r"derivative for .*flash_attention.* is not implemented"):
        trainer.train()
    assert chosen == [SDPBackend.MATH]


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "kernels/some-attention"])
def test_attention_without_second_derivatives_is_refused_for_t1t2(tmp_path, name):
    model = tiny_bert()
    # Set aside transformers' own check whether it is installed.
    model.config._attn_implementation_internal = name
    message = f"needs second derivatives, which attn_implementation='{name}' does not have.*'sdpa' or 'eager'"
    with pytest.raises(NotImplementedError, match=message):
        meta_trainer(tmp_path, model=model, hypergradient="t1t2")
    for hypergradient in ("evograd", "finite_difference"):
        meta_trainer(tmp_path, model=model, hypergradient=hypergradient)

"""PEFT: the inner step moves what is trained, adapters and `modules_to_save`, and everything is saved beside them."""

import pytest
import torch
from fake_hub import META_FILES, files
from peft import LoraConfig, get_peft_model
from tiny import (
    BEST_BY_SCORE,
    HiddenShift,
    Recorder,
    batch_of,
    meta_trainer,
    same,
    sentences,
    snapshot,
    tiny_bert,
    weight_net,
)
from torch.func import functional_call
from torch.testing import assert_close

from meta_trainer import MetaWeightNet
from meta_trainer.scope import select_parameters

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(seed=0, dropout=0.1, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(
        tiny_bert(dropout), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], **settings)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the beginning, so that nothing below them would have a derivative
            parameter.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize(
    ("perturb", "parts"),
    [
        (["all"], {"lora_A", "lora_B", "classifier"}),
        (["head"], {"classifier"}),
        (["*lora_B*"], {"lora_B"}),
        (["*query*", "*classifier*"], {"lora_A", "lora_B", "classifier"}),
    ],
)
def test_the_scope_is_that_of_the_adapters(tmp_path, perturb, parts):
    trainer = meta_trainer(tmp_path, model=adapted(), kind=Recorder, perturb=perturb, noise="guided")
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    scope = [names[id(p)] for p in select_parameters(trainer.model, perturb)]
    assert {part for part in ("lora_A", "lora_B", "classifier") if any(part in name for name in scope)} == parts
    assert all(any(part in name for part in parts) for name in scope)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(any(grad.abs().max() > 0 for grad in result.grads) for result in trainer.results)
    assert same(frozen, {name: p.detach() for name, p in trainer.model.named_parameters() if name in frozen})


@pytest.mark.parametrize("perturb", [["all"], ["*lora_*"]])
def test_the_hypergradient_on_adapters_is_that_of_an_unrolled_step(tmp_path, perturb):
    model, module = adapted(dropout=0.0).double(), HiddenShift().double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)  # the weights of a fresh model are so small that hardly anything gets through
    rate = 0.5
    trainer = meta_trainer(
        tmp_path, module, model, hypergradient="t1t2", learning_rate=rate, perturb=perturb, meta_learning_rate=0
    )
    train, meta = batch_of(sentences(4, 5)), batch_of(sentences(4, 6))
    result = trainer.meta_step(trainer.model, {**train, "meta_batch": meta})

    model.train()
    names = {id(p): name for name, p in model.named_parameters()}
    theta = {names[id(p)]: p for p in select_parameters(model, perturb)}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with module.attach(model, train):
            loss = model(**train).loss
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        moved = {name: p - rate * grad for (name, p), grad in zip(theta.items(), grads, strict=True)}
        expected = torch.autograd.grad(functional_call(model, moved, kwargs=meta).loss, list(module.parameters()))
    assert_close(result.grads, expected, rtol=1e-9, atol=1e-14)
    assert expected[0].abs().max() > 1e-5


def test_checkpoints_and_saved_models_hold_the_adapter_and_the_meta_module_beside_it(tmp_path):
    trainer = meta_trainer(tmp_path, model=adapted(), save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert files(folder) >= {*META_FILES, "adapter_config.json", "adapter_model.safetensors"}
    loaded = MetaWeightNet.from_pretrained(tmp_path / "meta_module")
    assert same(snapshot(loaded), snapshot(trainer.meta_module))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["pooler", "classifier"]}])
def test_a_resumed_run_on_adapters_equals_one_that_was_not_stopped(tmp_path, settings):
    arguments = {"save_strategy": "steps", "save_steps": 2, "meta_learning_rate": 0.05, "hypergradient": "t1t2"}
    straight = meta_trainer(tmp_path, model=adapted(**settings), **arguments)
    straight.train()
    resumed = meta_trainer(tmp_path / "resumed", weight_net(5), adapted(**settings), **arguments)
    for parameter in resumed.model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(snapshot(resumed.model), snapshot(straight.model))
    assert same(snapshot(resumed.meta_module), snapshot(straight.meta_module))
    assert not same(snapshot(straight.meta_module), snapshot(weight_net()))


def test_the_best_adapter_comes_with_its_meta_module(tmp_path):
    scores = iter([0.2, 0.9, 0.1, 0.3])
    trainer = meta_trainer(
        tmp_path,
        model=adapted(),
        keywords={"eval_dataset": sentences(4, 4), "compute_metrics": lambda predictions: {"score": next(scores)}},
        **BEST_BY_SCORE,
    )
    trainer.train()
    best = MetaWeightNet.from_pretrained(tmp_path / "checkpoint-2/meta_module")
    last = MetaWeightNet.from_pretrained(tmp_path / "checkpoint-4/meta_module")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(snapshot(trainer.meta_module), snapshot(best))
    assert not same(snapshot(best), snapshot(last))

"""Schedule-free optimizers train other parameters than they mean to be used."""

import pytest
import torch
from schedulefree import AdamWScheduleFree
from tiny import BEST_BY_SCORE, Recorder, losses_only, meta_trainer, same, sentences, snapshot, tiny_bert, weight_net
from torch import nn

from meta_trainer import MetaWeightNet
from meta_trainer.schedule_free import averages, iterates, restore_iterates, set_training_mode

BASE, META = {"optim": "schedule_free_adamw"}, {"meta_optim": "schedule_free_adamw", "meta_learning_rate": 0.05}


def trained():
    parameter = nn.Parameter(torch.randn(3))
    optimizer = AdamWScheduleFree([parameter], lr=0.1)
    optimizer.train()
    for _ in range(3):
        parameter.grad = torch.randn(3)
        optimizer.step()
    return parameter, optimizer


def test_the_averages_are_there_for_a_while_and_leave_no_trace():
    parameter, optimizer = trained()
    before, groups = parameter.detach().clone(), [dict(group) for group in optimizer.param_groups]
    with averages(optimizer):
        x = parameter.detach().clone()
    assert torch.equal(parameter, before)
    assert optimizer.param_groups[0]["train_mode"] is groups[0]["train_mode"] is True
    optimizer.eval()
    assert torch.equal(parameter, x)
    assert not torch.equal(x, before)
    with averages(optimizer):
        assert torch.equal(parameter, x)
    assert torch.equal(parameter, x)


def test_iterates_are_given_back_bit_for_bit():
    parameter, optimizer = trained()
    before = parameter.detach().clone()
    values = iterates(optimizer)
    set_training_mode(optimizer, False)
    assert iterates(optimizer) == []
    restore_iterates(optimizer, values)
    assert torch.equal(parameter, before)


def test_other_optimizers_have_no_modes():
    parameter = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    before = parameter.detach().clone()
    set_training_mode(optimizer, True)
    set_training_mode(None, True)
    with averages(optimizer):
        assert iterates(optimizer) == []
    assert torch.equal(parameter, before)


class AtBothSteps(Recorder):
    """Checks that the meta step sees the parameters that the base step trains."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.at_meta_step = []

    def meta_step(self, model, inputs):
        self.at_meta_step.append(snapshot(self.model))
        return super().meta_step(model, inputs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        assert same(self.at_meta_step[-1], snapshot(self.model))
        return loss


@pytest.mark.parametrize("hypergradient", ["evograd", "finite_difference", "t1t2"])
def test_a_meta_step_after_an_evaluation_sees_the_iterates(tmp_path, hypergradient):
    trainer = meta_trainer(
        tmp_path,
        kind=AtBothSteps,
        keywords={"eval_dataset": sentences(4, 4)},
        eval_strategy="steps",
        eval_steps=1,
        hypergradient=hypergradient,
        learning_rate=0.05,
        **BASE,
    )
    trainer.train()
    assert len(trainer.at_meta_step) == 4
    trainer.evaluate()
    assert not same(snapshot(trainer.model), trainer.at_meta_step[-1])


def test_the_files_hold_the_averages_and_saving_them_changes_nothing(tmp_path):
    saving = meta_trainer(tmp_path / "saving", save_strategy="steps", save_steps=1, **META)
    saving.train()
    silent = meta_trainer(tmp_path / "silent", **META)
    silent.train()
    silent.save_model()
    assert same(snapshot(saving.meta_module), snapshot(silent.meta_module))
    assert same(saving.meta_optimizer.state_dict(), silent.meta_optimizer.state_dict())

    last = MetaWeightNet.from_pretrained(tmp_path / "saving/checkpoint-4/meta_module")
    assert same(snapshot(last), snapshot(saving.meta_module))
    assert same(snapshot(MetaWeightNet.from_pretrained(tmp_path / "silent/meta_module")), snapshot(last))
    state = torch.load(tmp_path / "saving/checkpoint-4/meta_state.pt", weights_only=True)
    trained = dict(zip(dict(last.named_parameters()), state["iterates"], strict=True))
    assert not same(trained, snapshot(last))


@pytest.mark.parametrize("settings", [BASE, META, BASE | META])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, settings, evaluated):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 0.05, **settings}
    keywords = {}
    if evaluated:
        settings |= {"eval_strategy": "steps", "eval_steps": 2}
        keywords = {"eval_dataset": sentences(4, 4)}
    straight = meta_trainer(tmp_path, keywords=keywords, **settings)
    straight.train()
    resumed = meta_trainer(tmp_path / "resumed", weight_net(5), tiny_bert(seed=5), keywords=keywords, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(snapshot(resumed.model), snapshot(straight.model))
    assert same(snapshot(resumed.meta_module), snapshot(straight.meta_module))
    assert same(resumed.meta_optimizer.state_dict(), straight.meta_optimizer.state_dict())
    assert losses_only(resumed.state.log_history)[:-1] == losses_only(straight.state.log_history)[:-1]


def test_the_best_meta_module_is_loaded_as_it_was_saved(tmp_path):
    scores = iter([0.2, 0.9, 0.1, 0.3])
    trainer = meta_trainer(
        tmp_path,
        keywords={"eval_dataset": sentences(4, 4), "compute_metrics": lambda predictions: {"score": next(scores)}},
        **BEST_BY_SCORE,
        **META,
    )
    trainer.train()
    best = MetaWeightNet.from_pretrained(tmp_path / "checkpoint-2/meta_module")
    assert same(snapshot(trainer.meta_module), snapshot(best))


def test_the_warm_up_of_the_base_optimizer_does_not_reach_the_meta_optimizer(tmp_path):
    trainer = meta_trainer(tmp_path, warmup_steps=3, meta_warmup_steps=2, **META)
    assert trainer.meta_optimizer.param_groups[0]["warmup_steps"] == 0


def test_an_inner_step_of_a_schedule_free_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="inner step of AdamWScheduleFree is not known"):
        meta_trainer(tmp_path, inner_step="optimizer", hypergradient="t1t2", **BASE)

"""A run that was stopped and resumed ends as if it had not been stopped."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    BEST_BY_SCORE,
    NUM_TRAIN,
    HiddenShift,
    arguments,
    losses_only,
    meta_trainer,
    same,
    sentences,
    snapshot,
    tiny_bert,
    weight_net,
)
from transformers import Trainer, TrainingArguments, default_data_collator

from meta_trainer import MetaModuleList, MetaTrainer


def first_half(examples):
    """The meta batch is a function of the train batch."""
    return {
        **default_data_collator(examples),
        "meta_batch": default_data_collator(examples[: len(examples) // 2]),
    }


SETTINGS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "meta_lr_scheduler_type": "linear",
    "meta_warmup_steps": 2,
    "meta_learning_rate": 0.05,
    "per_device_meta_batch_size": 3,
}


def run(folder, modules=None, model=None, resume=None, by_collator=False, **settings):
    keywords = {"meta_dataset": None, "data_collator": first_half} if by_collator else {}
    trainer = meta_trainer(folder, modules, model, keywords=keywords, **{**SETTINGS, **settings})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def everything(trainer):
    return {
        "theta": snapshot(trainer.model),
        "lambda": snapshot(trainer.meta_module),
        "optimizer": trainer.optimizer.state_dict(),
        "meta optimizer": trainer.meta_optimizer.state_dict(),
        "meta schedule": trainer.meta_lr_scheduler.state_dict(),
        "meta steps": trainer._num_meta_steps,
        "meta batches": None if trainer.meta_data is None else trainer.meta_data.batches_read,
        "logs": losses_only([log for log in trainer.state.log_history if "loss" in log]),
        "random": torch.random.get_rng_state(),
    }


def disturb():
    """What another process would find: other random numbers."""
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


# Six batches an epoch: with two to a step, an epoch ends after step 3, else after step 6.
@pytest.mark.parametrize(
    ("accumulation", "meta_every", "by_collator", "hypergradient"),
    [
        (1, 1, False, "evograd"),
        (1, 2, True, "finite_difference"),
        (2, 1, True, "evograd"),
        (2, 2, False, "t1t2"),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, accumulation, meta_every, by_collator, hypergradient):
    settings = {
        "gradient_accumulation_steps": accumulation,
        "meta_every": meta_every,
        "by_collator": by_collator,
        "hypergradient": hypergradient,
        "per_device_train_batch_size": 4,
    }
    straight = everything(run(tmp_path, [weight_net(), HiddenShift()], **settings))
    assert straight["meta steps"] == 8 // meta_every
    end_of_epoch = 6 // accumulation
    for stopped_at in (end_of_epoch - 1, end_of_epoch):
        disturb()
        resumed = run(
            tmp_path / f"from {stopped_at}",
            [weight_net(seed=5), HiddenShift()],
            tiny_bert(seed=5),
            resume=tmp_path / f"checkpoint-{stopped_at}",
            **settings,
        )
        assert isinstance(resumed.meta_module, MetaModuleList)
        found = everything(resumed)
        assert [name for name in straight if not same({0: found[name]}, {0: straight[name]})] == []


@pytest.mark.parametrize("stopped_at", [1, 3, 5])
def test_a_run_goes_on_before_and_after_its_first_meta_step(tmp_path, stopped_at):
    settings = {"meta_delay_steps": 0.4, "meta_trust_region": 0.01}  # the first before the fifth of eight steps
    straight = everything(run(tmp_path, **settings))
    assert straight["meta steps"] == 4
    disturb()
    checkpoint = tmp_path / f"checkpoint-{stopped_at}"
    resumed = run(tmp_path / "resumed", weight_net(7), tiny_bert(seed=7), resume=checkpoint, **settings)
    assert same(everything(resumed), straight)


def test_a_run_goes_on_from_its_last_checkpoint_when_asked_to(tmp_path):
    straight = everything(run(tmp_path / "straight"))
    run(tmp_path / "stopped", max_steps=8)
    for step in (6, 7, 8):
        shutil.rmtree(tmp_path / "stopped" / f"checkpoint-{step}")
    resumed = meta_trainer(tmp_path / "stopped", weight_net(7), tiny_bert(seed=7), **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert same(everything(resumed), straight)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """The folder of a run with a checkpoint after each of two steps."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, max_steps=2)
    return folder


def copy_of(checkpoints, folder, without):
    checkpoint = folder / "checkpoint-1"
    shutil.copytree(checkpoints / "checkpoint-1", checkpoint)
    # As a run that knows no manifests leaves it: nothing is complained of before the files are read.
    for name in ("meta_manifest.json", *without):
        (checkpoint / name).unlink()
    return checkpoint


def test_a_checkpoint_without_meta_state_is_refused(tmp_path, checkpoints):
    checkpoint = copy_of(checkpoints, tmp_path, ["meta_state.pt"])
    with pytest.raises(ValueError, match=r"saved without a meta module: it has no meta_state\.pt"):
        run(tmp_path, resume=checkpoint)


def test_a_checkpoint_without_the_meta_module_is_refused(tmp_path, checkpoints):
    checkpoint = copy_of(checkpoints, tmp_path, ["meta_module/model.safetensors"])
    with pytest.raises(ValueError, match=r"No weights of a meta module at .*meta_module.model\.safetensors"):
        run(tmp_path, resume=checkpoint)


def test_a_checkpoint_of_trainer_is_refused(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    Trainer(
        tiny_bert(), arguments(tmp_path, TrainingArguments, **settings), train_dataset=sentences(NUM_TRAIN, 1)
    ).train()
    with pytest.raises(ValueError, match="No weights of a meta module"):
        run(tmp_path, resume=tmp_path / "checkpoint-1")


def test_a_checkpoint_of_another_meta_module_is_refused(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="does not fit this HiddenShift"):
        run(tmp_path, HiddenShift(), resume=checkpoints / "checkpoint-1")


def test_a_checkpoint_without_optimizer_states_is_gone_on_from_with_a_warning(tmp_path, caplog):
    run(tmp_path, save_only_model=True, max_steps=2)
    assert not (tmp_path / "checkpoint-1/meta_state.pt").exists()
    saved = weight_net(seed=5)
    saved.load_weights(tmp_path / "checkpoint-1/meta_module/model.safetensors")
    found = []

    class FirstMetaModule(MetaTrainer):
        def meta_step(self, model, inputs):
            found.append((self.state.global_step, self._num_meta_steps, snapshot(self.meta_module)))
            return super().meta_step(model, inputs)

    resumed = meta_trainer(tmp_path, weight_net(seed=6), kind=FirstMetaModule, **{**SETTINGS, "max_steps": 3})
    with caplog.at_level("WARNING", logger="meta_trainer"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "the meta optimizer starts anew" in caplog.text
    step, meta_steps, lam = found[0]
    assert (step, meta_steps) == (1, 0)
    assert same(lam, snapshot(saved))


def test_the_best_model_comes_with_its_meta_module(tmp_path):
    scores = iter([0.2, 0.9, 0.1, 0.3])
    trainer = meta_trainer(
        tmp_path,
        keywords={
            "eval_dataset": sentences(4, 4),
            "compute_metrics": lambda predictions: {"score": next(scores)},
        },
        **BEST_BY_SCORE,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = weight_net(5), weight_net(5)
    best.load_weights(tmp_path / "checkpoint-2/meta_module/model.safetensors")
    last.load_weights(tmp_path / "checkpoint-4/meta_module/model.safetensors")
    assert same(snapshot(trainer.meta_module), snapshot(best))
    assert not same(snapshot(best), snapshot(last))

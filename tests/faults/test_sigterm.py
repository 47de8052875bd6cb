"""SIGTERM ends a run between two steps, with a checkpoint that nothing is lost by."""

import json
import os
import signal
import threading

import pytest
from tiny import arguments, losses_only, meta_trainer, same, sentences, snapshot, tiny_bert, training_logs, weight_net
from transformers import TrainerCallback

from meta_trainer import MetaTrainer
from meta_trainer.checkpoint import newest_complete
from meta_trainer.sigterm import Terminated

# Six batches an epoch.
SETTINGS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 100,
    "logging_steps": 1,
    "meta_lr_scheduler_type": "linear",
    "meta_learning_rate": 0.05,
}


class SendSigterm(TrainerCallback):
    """The signal comes when the base optimizer is about to take step `step`, after the meta step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def trainer_in(folder, seed=0, sigterm_at=None, keywords=None, **settings):
    trainer = meta_trainer(
        folder, weight_net(seed), tiny_bert(seed=seed), keywords=keywords, **{**SETTINGS, **settings}
    )
    if sigterm_at is not None:
        trainer.add_callback(SendSigterm(sigterm_at))
    return trainer


def outcome(trainer):
    logs = losses_only([log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log])
    return {
        "theta": snapshot(trainer.model),
        "lambda": snapshot(trainer.meta_module),
        "optimizer": trainer.optimizer.state_dict(),
        "meta state": trainer._meta_state(),
        "logs": logs,
        "best": (trainer.state.best_metric, trainer.state.best_global_step),
    }


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (2, {"gradient_accumulation_steps": 2, "meta_every": 2, "save_total_limit": 1}),
        (5, {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "steps"}),
        (6, {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "loss"}),
        (8, {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True,
             "save_total_limit": 1}),
    ],
    ids=["within an epoch", "before the evaluation", "with the evaluation", "at the end"],
)  # fmt: skip
def test_a_run_that_was_stopped_by_sigterm_goes_on_as_if_it_had_not(tmp_path, step, settings):
    keywords = {"eval_dataset": sentences(4, 4)}
    straight = trainer_in(tmp_path / "straight", keywords=keywords, **settings)
    straight.train()

    stopped = trainer_in(tmp_path / "stopped", sigterm_at=step, keywords=keywords, **settings)
    with pytest.raises(Terminated) as stop:
        stopped.train()
    assert stop.value.code == 143
    assert stop.value.checkpoint == tmp_path / f"stopped/checkpoint-{step}" == newest_complete(tmp_path / "stopped")
    assert stopped.state.global_step == step
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    resumed = trainer_in(tmp_path / "stopped", seed=5, keywords=keywords, **settings)
    resumed.train(resume_from_checkpoint=True)
    expected, found = outcome(straight), outcome(resumed)
    assert [name for name in expected if not same({0: found[name]}, {0: expected[name]})] == []


def test_a_run_that_makes_its_model_itself_is_stopped_too(tmp_path):
    trainer = MetaTrainer(
        args=arguments(tmp_path, **SETTINGS),
        model_init=lambda: tiny_bert(),
        meta_module=weight_net(),
        train_dataset=sentences(24, 1),
        meta_dataset=sentences(8, 2),
    )
    trainer.add_callback(SendSigterm(2))
    with pytest.raises(Terminated):
        trainer.train()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_trainers_own_checkpoints_at_sigterm_come_at_the_end_of_the_step_too(tmp_path):
    trainer = trainer_in(tmp_path, sigterm_at=2, enable_jit_checkpoint=True, save_strategy="no")
    assert trainer.args.enable_jit_checkpoint
    with pytest.raises(Terminated):
        trainer.train()
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_a_handler_of_the_users_own_is_left_alone(tmp_path):
    heard = []
    previous = signal.signal(signal.SIGTERM, lambda *args: heard.append(1))
    try:
        trainer_in(tmp_path, sigterm_at=2, max_steps=3).train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == [1]


@pytest.mark.parametrize("error", [None, RuntimeError("of the user's own")], ids=["after a run", "after an error"])
def test_the_default_handler_comes_back(tmp_path, error):
    found = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(signal.getsignal(signal.SIGTERM))
            if error is not None:
                raise error

    trainer = trainer_in(tmp_path, max_steps=1)
    trainer.add_callback(Look())
    callbacks = list(trainer.callback_handler.callbacks)
    if error is None:
        trainer.train()
    else:
        with pytest.raises(RuntimeError, match="of the user's own"):
            trainer.train()
    assert found[0] is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert trainer.callback_handler.callbacks == callbacks


def test_a_signal_after_the_last_step_is_passed_on(tmp_path):
    """To the handler of before, which would end the process; here it is looked for that it is raised again."""
    raised = []

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = trainer_in(tmp_path, max_steps=1)
    trainer.add_callback(AtTheEnd())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "raise_signal", raised.append)
        trainer.train()
    assert raised == [signal.SIGTERM]


def test_without_checkpoints_sigterm_is_nobodys_business(tmp_path):
    found = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(signal.getsignal(signal.SIGTERM))

    trainer = trainer_in(tmp_path, max_steps=1, save_strategy="no")
    trainer.add_callback(Look())
    trainer.train()
    assert found == [signal.SIG_DFL]


def test_a_run_in_another_thread_trains_without_a_handler(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(timeout=60)
    assert len(training_logs(trainer)) == 1

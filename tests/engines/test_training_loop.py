"""Settings of Trainer's loop: a meta step goes along with all of them."""

import pytest
import torch
from tiny import (
    NUM_TRAIN,
    HiddenShift,
    IdentityModule,
    PointClassifier,
    Recorder,
    arguments,
    batch_of,
    losses_only,
    meta_trainer,
    plain_trainer,
    points,
    same,
    sentences,
    snapshot,
    tiny_bert,
    training_logs,
    weight_net,
)
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments


class Stream(IterableDataset):
    """Sentences one after another, without a length."""

    def __iter__(self):
        return iter(sentences(NUM_TRAIN, 1))


def ends(trainer):
    trainer.train()
    return {"theta": snapshot(trainer.model), "lambda": snapshot(trainer.meta_module)}


@pytest.mark.parametrize("meta_every", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_train_examples(tmp_path, meta_every, workers):
    settings = {"meta_every": meta_every, "dataloader_num_workers": workers, "max_steps": 8}
    trainer = meta_trainer(tmp_path, kind=Recorder, keywords={"train_dataset": Stream()}, **settings)
    trainer.train()
    # Six batches are a pass.
    assert trainer.state.global_step == 8
    assert len(trainer.results) == 8 // meta_every


def test_a_stream_is_resumed_in_the_middle_bit_for_bit(tmp_path):
    settings = {"max_steps": 8, "meta_every": 2, "save_strategy": "steps", "save_steps": 3}
    keywords = {"train_dataset": Stream()}
    straight = ends(meta_trainer(tmp_path, keywords=keywords, **settings))
    resumed = meta_trainer(tmp_path / "resumed", weight_net(5), tiny_bert(seed=5), keywords=keywords, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(snapshot(resumed.model), straight["theta"])
    assert same(snapshot(resumed.meta_module), straight["lambda"])


SETTINGS = {
    "one worker": {"dataloader_num_workers": 1},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "drop last": {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "empty cache": {"torch_empty_cache_steps": 1},
    "token count": {"include_num_input_tokens_seen": "all"},
    "no clipping": {"max_grad_norm": 0},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "rmsprop": {"optim": "rmsprop"},
    "noise on the embeddings": {"neftune_noise_alpha": 5.0},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    "a share of warm-up": {"warmup_steps": 0.5},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 12},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_meta_step_without_influence_leaves_training_as_it_is_in_trainer(tmp_path, name):
    """The meta module computes what the model does, and the meta steps leave no trace."""
    settings = {"logging_steps": 1, **SETTINGS[name]}
    held_out = sentences(5, 4)
    plain = Trainer(
        tiny_bert(),
        arguments(tmp_path, TrainingArguments, **settings),
        train_dataset=sentences(NUM_TRAIN, 1),
        eval_dataset=held_out,
    )
    plain.train()
    keywords = {"eval_dataset": held_out}
    trainer = meta_trainer(tmp_path, IdentityModule(), kind=Recorder, keywords=keywords, **settings)
    trainer.train()
    assert len(trainer.results) == trainer.state.global_step == plain.state.global_step
    assert same(snapshot(trainer.model), snapshot(plain.model))
    bare = [{k: v for k, v in log.items() if not k.startswith("meta/")} for log in training_logs(trainer)]
    assert losses_only(bare) == losses_only(training_logs(plain))
    assert trainer.state.num_input_tokens_seen == plain.state.num_input_tokens_seen


@pytest.mark.parametrize("estimator", [{}, {"noise": "guided"}, {"hypergradient": "finite_difference"}])
def test_all_candidates_see_the_same_noise_on_the_embeddings(tmp_path, estimator):
    model, batches, states = tiny_bert(dropout=0.0), [], []
    trainer = meta_trainer(tmp_path, HiddenShift(), model, neftune_noise_alpha=5.0, max_steps=1, **estimator)
    trainer._shared_forward._compiled = True  # so that every candidate runs the whole model
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)  # and so the same for all candidates
    model.bert.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0]))
    model.bert.encoder.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].detach().clone()))
    trainer.train()
    # The last pass is the base step's.
    on_train_batch = [s for batch, s in zip(batches, states, strict=True) if torch.equal(batch, batches[-1])]
    assert len(on_train_batch) == 3
    assert len(states) > 3
    assert all(torch.equal(state, on_train_batch[0]) for state in on_train_batch)
    with torch.no_grad():
        assert not torch.equal(model.bert.embeddings(batches[-1]), on_train_batch[0])


def test_evaluation_during_training_leaves_the_meta_module_and_its_batches_alone(tmp_path):
    """Without dropout, as Trainer itself takes one random number for every evaluation."""
    settings = {"logging_steps": 1, "max_steps": 6}
    silent = meta_trainer(tmp_path, model=tiny_bert(dropout=0.0), **settings)
    silent.train()
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    keywords = {"eval_dataset": sentences(5, 4)}
    evaluated = meta_trainer(tmp_path, model=tiny_bert(dropout=0.0), keywords=keywords, **settings)
    evaluated.train()
    assert same(snapshot(evaluated.model), snapshot(silent.model))
    assert same(snapshot(evaluated.meta_module), snapshot(silent.meta_module))
    assert evaluated.meta_data.batches_read == silent.meta_data.batches_read == 6
    assert losses_only(training_logs(evaluated)) == losses_only(training_logs(silent))
    assert sum("eval_loss" in log for log in evaluated.state.log_history) == 6


def test_a_model_that_trainer_does_not_place_is_trained_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "place_model_on_device", property(lambda self: False))
    trainer = meta_trainer(tmp_path, kind=Recorder)
    assert trainer.place_model_on_device is False
    trainer.train()
    assert len(trainer.results) == 4


def test_evaluating_and_predicting_need_no_training(tmp_path):
    model, data = tiny_bert(), sentences(6, 4)
    trainer = meta_trainer(tmp_path, HiddenShift(), model)
    plain = plain_trainer(tmp_path, tiny_bert())
    assert trainer.evaluate(data)["eval_loss"] == plain.evaluate(data)["eval_loss"]
    assert (trainer.predict(data).predictions == plain.predict(data).predictions).all()
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("hypergradient", ["evograd", "finite_difference", "t1t2"])
def test_a_second_run_starts_its_schedules_anew_and_takes_every_meta_step(tmp_path, hypergradient):
    trainer = meta_trainer(
        tmp_path,
        kind=Recorder,
        hypergradient=hypergradient,
        meta_every=2,
        meta_lr_scheduler_type="linear",
        meta_learning_rate=0.05,
        logging_steps=1,
    )
    rates = []
    for _ in range(2):
        trainer.train()
        rates.append([log["meta/learning_rate"] for log in training_logs(trainer) if "meta/learning_rate" in log])
    assert rates[0] == rates[1] == pytest.approx([0.05, 0.025])
    assert len(trainer.results) == 4
    assert [event for event in trainer.events if event in ("meta", "base")] == ["meta", "base", "base"] * 4


def test_callbacks_are_told_what_trainer_tells_them(tmp_path):
    class Listener(TrainerCallback):
        def __init__(self):
            self.events = []

        def __getattribute__(self, name):
            if name.startswith("on_") and name != "on_init_end":
                self.events.append(name)
            return super().__getattribute__(name)

    heard = []
    for kind in (plain_trainer, meta_trainer):
        listener = Listener()
        trainer = kind(tmp_path, save_strategy="steps", save_steps=2)
        trainer.add_callback(listener)
        trainer.train()
        heard.append(listener.events)
    assert heard[0] == heard[1]
    assert "on_step_end" in heard[0]


def test_a_callback_may_end_training_between_meta_steps(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = meta_trainer(tmp_path, kind=Recorder, keywords={"callbacks": [Stop()]})
    trainer.train()
    assert len(trainer.results) == trainer.state.global_step == 2


def test_a_model_that_returns_tuples_and_has_no_config(tmp_path):
    trainer = meta_trainer(tmp_path, model=PointClassifier(as_tuple=True), kind=Recorder)
    trainer.train()
    result = trainer.meta_step(trainer.model, {**batch_of(points(4, 5)), "meta_batch": batch_of(points(4, 6))})
    assert any(grad.abs().max() > 0 for grad in result.grads)

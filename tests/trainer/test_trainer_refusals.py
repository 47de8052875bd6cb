"""What MetaTrainer refuses, and its meta data."""

import pytest
import torch
from tiny import (
    NUM_META,
    HiddenShift,
    IdentityModule,
    MeanLoss,
    PointClassifier,
    meta_trainer,
    points,
    sentences,
    tiny_bert,
    weight_net,
)
from transformers import TrainingArguments

from meta_trainer import MetaModule, MetaTrainer


def test_meta_data_that_is_missing_is_an_error(tmp_path):
    trainer = meta_trainer(tmp_path, keywords={"meta_dataset": None})
    with pytest.raises(ValueError, match=r"needs meta data.*columns are \['input_ids', 'labels'\]"):
        trainer.train()


@pytest.mark.parametrize(("meta_dataset", "message"), [([], "at least one example"), (iter([]), "map-style data set")])
def test_a_meta_dataset_without_examples_or_length_is_refused(tmp_path, meta_dataset, message):
    with pytest.raises(ValueError, match=message):
        meta_trainer(tmp_path, keywords={"meta_dataset": meta_dataset})


def test_a_train_dataset_without_examples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` should hold at least one example, got none"):
        meta_trainer(tmp_path, keywords={"train_dataset": []}).train()


@pytest.mark.parametrize("kind", ["train", "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": 2}, "`labels` should lie between 0 and 1"),
        ({"input_ids": [50] * 6}, "`input_ids` should lie between"),
    ],
)
def test_rows_that_the_model_cannot_take_are_refused_before_a_pass(tmp_path, kind, change, message):
    rows = [{**row, **change} for row in sentences(8, 1)]
    trainer = meta_trainer(tmp_path, keywords={f"{kind}_dataset": rows})
    with pytest.raises(ValueError, match=f"BertForSequenceClassification cannot take a {kind} batch: {message}"):
        trainer.train()


@pytest.mark.parametrize("meta_module", [3, "weights", torch.nn.Linear(1, 1), [torch.nn.Linear(1, 1)], MetaModule])
def test_what_is_no_meta_module_is_refused(tmp_path, meta_module):
    with pytest.raises(ValueError, match="should be a MetaModule, or a list of them"):
        meta_trainer(tmp_path, meta_module)


@pytest.mark.parametrize("data", [{"train": sentences(4, 1)}, "corpus"])
def test_a_dictionary_of_splits_is_no_data_set(tmp_path, data):
    with pytest.raises(ValueError, match="`meta_dataset` should be a data set or a list of examples, got "):
        meta_trainer(tmp_path, keywords={"meta_dataset": data})
    with pytest.raises(ValueError, match="`train_dataset` should be a data set or a list of examples, got "):
        meta_trainer(tmp_path, keywords={"train_dataset": data}).train()


def test_arguments_of_the_wrong_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`args` should be MetaTrainingArguments, got dict"):
        MetaTrainer(tiny_bert(), {"output_dir": str(tmp_path)}, meta_module=weight_net())
    with pytest.raises(ValueError, match="`model` should be a module of PyTorch, got str"):
        MetaTrainer("bert", meta_module=weight_net())
    with pytest.raises(ValueError, match=r"`per_example_loss` should be a function .*, got 5"):
        meta_trainer(tmp_path, keywords={"per_example_loss": 5})


class Vector(IdentityModule):
    def reduce(self, losses, batch, outputs):
        return losses * self.unused.sum()


@pytest.mark.parametrize(("module", "found"), [(Vector(), r"shape \[4\]"), (MeanLoss(), "None")])
def test_a_meta_module_that_returns_no_scalar_is_refused(tmp_path, monkeypatch, module, found):
    if found == "None":
        monkeypatch.setattr(module, "reduce", lambda losses, batch, outputs: None)
    message = f"{type(module).__name__}.reduce should return a scalar tensor, got {found}"
    with pytest.raises(ValueError, match=message):
        meta_trainer(tmp_path, module).train()


def test_a_batch_door_that_returns_no_dictionary_is_refused(tmp_path, monkeypatch):
    module = IdentityModule()
    monkeypatch.setattr(module, "transform_batch", lambda batch: None)
    with pytest.raises(ValueError, match=r"IdentityModule.transform_batch should return a dictionary, got NoneType"):
        meta_trainer(tmp_path, module).train()


def test_an_objective_that_is_no_scalar_is_refused(tmp_path):
    keywords = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs["logits"]}
    with pytest.raises(ValueError, match=r"The training loss should be a scalar, got shape \[4, 2\]"):
        meta_trainer(tmp_path, HiddenShift(), keywords=keywords).train()


@pytest.mark.parametrize("losses", [None, torch.tensor(1.0)])
def test_per_example_losses_that_are_none_are_refused(tmp_path, losses):
    trainer = meta_trainer(tmp_path, keywords={"per_example_loss": lambda outputs, labels: losses})
    with pytest.raises(ValueError, match=r"`per_example_loss` should return one loss per example, a tensor \[N\], got"):
        trainer.train()


def test_the_users_own_objective_may_read_columns_that_the_model_does_not_take(tmp_path):
    class Weighted(MetaTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weight = inputs["importance"].mean()
            inputs = {name: column for name, column in inputs.items() if name != "importance"}
            return weight * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    rows = [{**row, "importance": 2.0} for row in points(8, 1)]
    keywords = {"train_dataset": rows, "meta_dataset": rows}
    trainer = meta_trainer(tmp_path, None, PointClassifier(), Weighted, keywords, remove_unused_columns=False)
    trainer.train()
    assert trainer._num_meta_steps == 4


def test_tokens_that_were_added_to_the_model_later_are_let_through(tmp_path):
    trainer = meta_trainer(tmp_path, keywords={"meta_dataset": [{"input_ids": [55] * 6, "labels": 1}]})
    trainer.model.resize_token_embeddings(60)
    trainer.train()
    assert trainer._num_meta_steps == 4


def test_a_module_that_transforms_the_batch_may_be_given_any_labels(tmp_path):
    class Corrected(IdentityModule):
        def transform_batch(self, batch):
            return {**batch, "labels": batch["labels"].clamp(max=1)}

    rows = [{**row, "labels": 5} for row in sentences(8, 1)]
    trainer = meta_trainer(tmp_path, Corrected(), keywords={"train_dataset": rows})
    trainer.train()
    assert trainer.state.global_step == 4


def test_the_data_collator_stays_the_users_own(tmp_path):
    trainer = meta_trainer(tmp_path)
    collator = trainer.data_collator
    trainer.get_train_dataloader()
    assert trainer.data_collator is collator


def test_every_example_of_the_meta_dataset_is_seen_once_a_pass(tmp_path):
    trainer = meta_trainer(tmp_path, per_device_meta_batch_size=NUM_META)
    for _ in range(2):
        seen = next(trainer.meta_data)["input_ids"].tolist()
        assert sorted(seen) == sorted(example["input_ids"].tolist() for example in sentences(NUM_META, 2))


def test_a_meta_module_that_cannot_learn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="MetaModule has no trainable parameter"):
        meta_trainer(tmp_path, MetaModule())


def test_a_meta_module_that_holds_the_model_is_refused(tmp_path):
    model, module = tiny_bert(), IdentityModule()
    module.inner = model.classifier
    with pytest.raises(ValueError, match="share parameters"):
        meta_trainer(tmp_path, module, model)


def test_a_scope_that_matches_nothing_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"'clasifier.\*', which matches no trainable parameter"):
        meta_trainer(tmp_path, perturb=["clasifier.*"])


def test_data_parallelism_within_one_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.nn\.DataParallel.*accelerate launch"):
        meta_trainer(tmp_path)


def test_embeddings_that_grow_after_the_trainer_was_made_are_known(tmp_path):
    model = tiny_bert()
    trainer = meta_trainer(tmp_path, model=model, max_steps=1)
    model.resize_token_embeddings(60)
    trainer.train_dataset = [{"input_ids": row["input_ids"] + 9, "labels": row["labels"]} for row in sentences(8, 1)]
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"features": torch.ones(4), "labels": 7}] * 8, "Target 7 is out of bounds"),
        ([{"features": torch.ones(3), "labels": 1}] * 8, "shapes cannot be multiplied"),
        ([{"features": torch.ones(4).long(), "labels": 1}] * 8, "dtype"),
    ],
)
@pytest.mark.parametrize("of", ["train_dataset", "meta_dataset"])
def test_batches_that_a_model_of_the_users_own_cannot_take_end_in_one_error(tmp_path, rows, words, of):
    trainer = meta_trainer(tmp_path, model=PointClassifier(), keywords={of: rows})
    with pytest.raises(ValueError, match=rf"(?s)The first meta step failed with \w+: .*{words}.*check that the"):
        trainer.train()


def test_running_out_of_memory_in_the_first_meta_step_keeps_its_kind(tmp_path):
    trainer = meta_trainer(tmp_path)
    trainer.compute_loss = lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        trainer.train()

"""What MetaTrainer refuses, and its meta data."""

import pytest
from tiny import (
    NUM_META,
    IdentityModule,
    meta_trainer,
    sentences,
    tiny_bert,
)
from transformers import TrainingArguments

from meta_trainer import MetaModule


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

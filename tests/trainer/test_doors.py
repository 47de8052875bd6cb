"""The doors of the meta module: open on train batches, shut everywhere else."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import (
    NUM_META,
    NUM_TRAIN,
    IdentityModule,
    MeanLoss,
    PointClassifier,
    Spy,
    batch_of,
    meta_trainer,
    points,
    sentences,
)
from transformers import default_data_collator

from meta_trainer import MetaModuleList, RepresentationTransform

META_MARK = 77.0


def marked(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Meta examples, to be recognised by their first feature."""
    return [{**e, "features": torch.cat([torch.tensor([META_MARK]), e["features"][1:]])} for e in examples]


def with_source(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**example, "is_source": i % 2 == 0} for i, example in enumerate(examples)]


def spied(folder, module=None, **keywords):
    given = {
        "train_dataset": with_source(points(NUM_TRAIN, 1)),
        "meta_dataset": with_source(marked(points(NUM_META, 2))),
        "eval_dataset": with_source(marked(points(6, 4))),
        **keywords,
    }
    return meta_trainer(folder, module or Spy(), PointClassifier(), keywords=given, per_device_eval_batch_size=3)


def test_the_doors_open_in_order_for_every_train_batch_and_for_no_meta_batch(tmp_path):
    trainer = spied(tmp_path)
    trainer.train()
    calls = trainer.meta_module.calls
    # Two candidates and the base step, on each of four steps; no unperturbed losses were asked for.
    assert [name for name, _ in calls] == ["transform_batch", "attach", "reduce"] * 3 * 4
    for name, batch in calls:
        assert not (batch["features"][:, 0] == META_MARK).any()
        assert ("seen" in batch) == (name != "transform_batch")
        assert batch["is_source"].dtype == torch.bool


def test_the_doors_are_shut_in_evaluation_and_prediction(tmp_path):
    trainer = spied(tmp_path)
    examples = with_source(points(6, 4))
    before = trainer.evaluate()["eval_loss"]
    trainer.predict(examples)
    assert trainer.meta_module.calls == []
    trainer.train()
    trainer.meta_module.calls.clear()
    assert trainer.evaluate()["eval_loss"] != before
    trainer.predict(examples)
    trainer.compute_loss(trainer.model, batch_of(examples))
    assert trainer.meta_module.calls == []


def test_the_doors_are_shut_in_an_evaluation_during_training(tmp_path):
    trainer = spied(tmp_path)
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
    trainer.train()
    assert len(trainer.meta_module.calls) == 3 * 3 * 4


def test_columns_of_the_meta_module_are_kept_from_the_model(tmp_path):
    trainer = spied(tmp_path)
    seen = []
    trainer.model.register_forward_pre_hook(lambda m, a, inputs: seen.append(sorted(inputs)), with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    trainer.predict(with_source(points(6, 4)))
    assert len(seen) == 4 * 4 + 2 + 2
    assert all(columns == ["features", "labels"] for columns in seen)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_columns_of_the_meta_module_survive_the_removal_of_unused_ones(tmp_path, remove_unused_columns):
    def table(examples):
        rows = [{**e, "features": e["features"].tolist()} for e in with_source(examples)]
        extra = {"note": "for the reader"} if remove_unused_columns else {}
        return Dataset.from_list([{**row, **extra} for row in rows])

    trainer = meta_trainer(
        tmp_path,
        Spy(),
        PointClassifier(),
        keywords={"train_dataset": table(points(NUM_TRAIN, 1)), "meta_dataset": table(points(NUM_META, 2))},
        remove_unused_columns=remove_unused_columns,
    )
    trainer.train()
    columns = {name: set(batch) for name, batch in trainer.meta_module.calls}
    assert columns["transform_batch"] == {"features", "labels", "is_source"}
    assert trainer.evaluate(table(points(6, 4)))["eval_loss"] > 0


class ReadsDomain(IdentityModule):
    batch_columns = ("domain",)

    def transform_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "domain": batch["domain"] + 1}


def test_a_list_of_meta_modules_asks_for_the_columns_of_all(tmp_path):
    examples = [{**example, "domain": 4} for example in with_source(points(NUM_TRAIN, 1))]
    trainer = spied(tmp_path, MetaModuleList([ReadsDomain(), Spy()]), train_dataset=examples)
    trainer.train()
    _, spy = trainer.meta_module
    assert len(spy.calls) == 3 * 3 * 4
    assert all(batch["domain"].tolist() == [5] * 4 for _, batch in spy.calls)
    assert trainer.evaluate(examples)["eval_loss"] > 0


def test_hidden_states_of_source_examples_alone_are_transformed(tmp_path):
    trainer = meta_trainer(
        tmp_path,
        RepresentationTransform(hidden_size=8, bottleneck_size=4),
        keywords={"train_dataset": with_source(sentences(NUM_TRAIN, 1))},
        hypergradient="t1t2",
        meta_learning_rate=0.1,
    )
    trainer.train()
    model = trainer.model.eval()
    batch = batch_of(with_source(sentences(4, 1)))
    plain = model(input_ids=batch["input_ids"]).logits
    with trainer.meta_module.attach(model, batch):
        changed = (model(input_ids=batch["input_ids"]).logits != plain).any(dim=1)
    assert changed.tolist() == [True, False, True, False]
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, plain)


def twins(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that gives the first half of a train batch again, as its meta batch."""
    half = len(examples) // 2
    return {**default_data_collator(examples), "meta_batch": default_data_collator(examples[:half])}


def test_the_meta_batch_of_the_collator_is_the_one_used(tmp_path):
    trainer = meta_trainer(
        tmp_path,
        MeanLoss(),
        PointClassifier(),
        keywords={"meta_dataset": None, "data_collator": twins},
        max_steps=2,
    )
    sizes = []
    trainer.model.register_forward_pre_hook(
        lambda m, a, inputs: sizes.append((sorted(inputs), len(inputs["labels"]))), with_kwargs=True
    )
    trainer.train()
    train_pass, meta_pass = (["features", "labels"], 4), (["features", "labels"], 2)
    assert sizes == [train_pass, train_pass, meta_pass, train_pass] * 2


def test_the_meta_batch_of_the_collator_goes_before_the_meta_dataset(tmp_path):
    trainer = meta_trainer(tmp_path, model=PointClassifier(), keywords={"data_collator": twins}, max_steps=2)
    trainer.train()
    assert trainer._num_meta_steps == 2
    assert trainer.meta_data.batches_read == 0


def test_a_collator_with_meta_batches_serves_evaluation_too(tmp_path):
    trainer = meta_trainer(
        tmp_path,
        model=PointClassifier(),
        keywords={"meta_dataset": None, "data_collator": twins},
        max_steps=2,
    )
    plain = meta_trainer(tmp_path, model=PointClassifier(), max_steps=2)
    assert trainer.evaluate(points(8, 4))["eval_loss"] == plain.evaluate(points(8, 4))["eval_loss"]
    assert trainer.predict(points(8, 4)).predictions.shape == (8, 2)

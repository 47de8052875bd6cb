from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from meta_trainer.tasks import ModelArguments, Task
from meta_trainer.tasks.ner import NerArguments, build_ner_task


def build(ner: NerArguments, model: ModelArguments, **changes: Any) -> Task:
    return build_ner_task(ner, model, **({"seed": 1, "with_meta": True, "meta_batch_size": 4} | changes))


def trainer(task: Task, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(
        model=task.model_init(), args=arguments, train_dataset=task.train_dataset, eval_dataset=task.eval_dataset,
        data_collator=task.data_collator, compute_metrics=task.compute_metrics,
        processing_class=task.processing_class,
    )  # fmt: skip


def test_per_batch_draws_on_all_target_sentences_and_adds_a_meta_half(generated, tiny_model, tmp_path):
    task = build(generated(), tiny_model)
    assert task.meta_dataset is None
    assert len(task.data_collator.target) == 20
    batch = next(iter(trainer(task, tmp_path).get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 4 + 3
    assert batch["is_source"].tolist() == [True] * 4 + [False] * 3
    assert batch["meta_batch"]["input_ids"].shape[0] == 4


def test_a_fixed_split_parts_the_target_sentences_without_overlap(generated, tiny_model, tmp_path):
    task = build(generated(meta_split="fixed", meta_fraction=0.3), tiny_model)
    assert task.meta_dataset is not None
    train = [tuple(row["input_ids"]) for row in task.data_collator.target]
    meta = [tuple(row["input_ids"]) for row in task.meta_dataset.to_list()]
    assert (len(train), len(meta)) == (14, 6)
    joint = build(generated(), tiny_model, with_meta=False)
    assert sorted(train + meta) == sorted(tuple(row["input_ids"]) for row in joint.data_collator.target)
    batch = next(iter(trainer(task, tmp_path).get_train_dataloader()))
    assert "is_source" in batch
    assert "meta_batch" not in batch


@pytest.mark.parametrize("meta_split", ["per_batch", "fixed"])
def test_joint_training_trains_on_all_target_sentences_and_marks_nothing(generated, tiny_model, tmp_path, meta_split):
    task = build(generated(meta_split=meta_split), tiny_model, with_meta=False)
    assert task.meta_dataset is None
    assert len(task.data_collator.target) == 20
    batch = next(iter(trainer(task, tmp_path).get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape[0] == 4 + 3


@pytest.mark.parametrize("mark_source", [True, False])
@pytest.mark.parametrize("mark_target", [True, False])
def test_batches_for_a_meta_module_have_the_marks_that_are_asked_for(
    generated, tiny_model, tmp_path, mark_source, mark_target
):
    task = build(generated(), tiny_model, mark_source=mark_source, mark_target=mark_target)
    batch = next(iter(trainer(task, tmp_path).get_train_dataloader()))
    marks = [name for name, asked in (("is_source", mark_source), ("is_trusted", mark_target)) if asked]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "meta_batch", *marks}
    if mark_target:
        assert batch["is_trusted"].tolist() == [False] * 4 + [True] * 3


def test_without_a_meta_module_no_row_is_marked(generated, tiny_model, tmp_path):
    task = build(generated(), tiny_model, with_meta=False, mark_source=True, mark_target=True)
    batch = next(iter(trainer(task, tmp_path).get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_trainer_trains_and_evaluates_the_target_validation_set_alone(generated, tiny_model, tmp_path):
    task = build(generated(), tiny_model, with_meta=False)
    run = trainer(task, tmp_path)
    run.train()
    scores = run.evaluate()
    assert {"eval_f1", "eval_precision", "eval_recall", "eval_accuracy"} <= set(scores)
    output = run.predict(task.eval_dataset)
    assert output.predictions.shape[0] == len(task.eval_dataset) == 60
    assert output.metrics["test_f1"] == scores["eval_f1"]


def test_models_of_one_task_start_alike_whatever_the_global_generator_holds(generated, tiny_model):
    task = build(generated(), tiny_model)
    torch.manual_seed(5)
    first, state = task.model_init(), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = task.model_init()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = build(generated(), tiny_model, seed=2).model_init()
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_the_model_names_its_classes(generated, tiny_model):
    config = build(generated(), tiny_model).model_init().config
    assert [config.id2label[i] for i in range(config.num_labels)] == [
        "O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER",
    ]  # fmt: skip
    assert config.label2id["B-PER"] == 5


def test_a_pretrained_model_is_loaded_from_its_folder_with_a_new_head_of_the_right_size(
    generated, tiny_model, tmp_path
):
    scratch = build(generated(), tiny_model)
    saved = scratch.model_init()
    saved.save_pretrained(tmp_path)
    scratch.processing_class.save_pretrained(tmp_path)
    task = build(generated(map_tags=["ORG=O"]), ModelArguments(model_name_or_path=str(tmp_path)))
    loaded = task.model_init()
    assert loaded.config.num_labels == 5
    embeddings = loaded.get_input_embeddings().weight
    assert torch.equal(embeddings, saved.get_input_embeddings().weight)
    assert torch.equal(loaded.classifier.weight, task.model_init().classifier.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 600}, "max_length=600 is more than the 512 sub-tokens"),
        ({"max_target_examples": 6}, "takes 7 distinct target sentences .* there are 6"),
        ({"meta_split": "fixed", "meta_fraction": 0.01}, "leaves 0 for the meta set and 20 to train on"),
    ],
)
def test_settings_that_do_not_fit_data_or_model_are_refused(generated, tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        build(generated(**changes), tiny_model)


def test_an_empty_meta_batch_is_refused(generated, tiny_model):
    with pytest.raises(ValueError, match="at least one sentence, got meta_batch_size=0"):
        build(generated(), tiny_model, meta_batch_size=0)


def test_a_model_that_cannot_be_found_is_refused(generated, tmp_path):
    name = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"'{name}'"):
        build(generated(), ModelArguments(model_name_or_path=name))


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 0}, {"vocab_size": -1}, {"hidden_size": 30, "num_attention_heads": 4}]
)
def test_sizes_that_no_encoder_can_have_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ModelArguments(**changes)


@pytest.mark.real_data
def test_english_and_quechua_wikiann_are_loaded_and_encoded(data_dir, tiny_model):
    ner = NerArguments(
        data_dir=str(data_dir),
        source_train_file="ner/wikiann_en_train.parquet",
        target_train_file="ner/wikiann_qu_train.parquet",
        target_validation_file="ner/wikiann_qu_dev.parquet",
        target_test_file="ner/wikiann_qu_test.parquet",
        exclude_column="dup",
    )
    task = build(ner, tiny_model)
    assert len(task.train_dataset) == 5000
    assert 0 < len(task.data_collator.target) <= 100
    assert len(task.test_dataset) == 100
    assert set(task.model_init().config.label2id) == {
        "O",
        "B-LOC",
        "I-LOC",
        "B-ORG",
        "I-ORG",
        "B-PER",
        "I-PER",
    }


@pytest.mark.real_data
def test_dates_of_masakhaner_are_dropped(data_dir, tiny_model):
    ner = NerArguments(
        data_dir=str(data_dir),
        source_train_file="ner/wikiann_en_dev.parquet",
        target_train_file="ner/masakhaner2_swa_train.parquet",
        map_tags=["DATE=O"],
        max_source_examples=50,
    )
    assert build(ner, tiny_model).model_init().config.num_labels == 7

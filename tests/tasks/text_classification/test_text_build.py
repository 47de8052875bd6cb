import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from meta_trainer.tasks import ModelArguments, Task
from meta_trainer.tasks.text_classification import TextClassificationArguments, build_text_classification_task


def build(arguments: TextClassificationArguments, model: ModelArguments, **changes: Any) -> Task:
    return build_text_classification_task(arguments, model, **({"seed": 1, "with_meta": True} | changes))


def trainer(task: Task, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    return Trainer(
        model=task.model_init(), args=arguments, train_dataset=task.train_dataset, eval_dataset=task.eval_dataset,
        data_collator=task.data_collator, compute_metrics=task.compute_metrics,
        processing_class=task.processing_class,
    )  # fmt: skip


def texts_of(task: Task, dataset: Any) -> set[str]:
    return set(task.processing_class.batch_decode(dataset["input_ids"]))


def test_batches_hold_what_the_model_takes_and_nothing_of_the_noise(generated, tiny_model, tmp_path):
    task = build(generated(label_noise="flip", label_noise_share=0.4), tiny_model)
    for dataset in (task.train_dataset, task.meta_dataset, task.eval_dataset, task.test_dataset):
        assert dataset.column_names == ["input_ids", "attention_mask", "labels"]
    batch = next(iter(trainer(task, tmp_path).get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].shape == (4,)


def test_texts_that_are_cut_are_counted(generated, tiny_model, caplog):
    build(generated(max_length=64), tiny_model)
    assert not caplog.messages
    task = build(generated(max_length=4), tiny_model)
    assert {len(ids) for ids in task.train_dataset["input_ids"]} == {4}
    assert "108 of 108 texts are cut to 4 sub-tokens (max_length)." in caplog.messages


def test_the_record_of_the_labels_goes_with_the_training_rows(generated, tiny_model):
    task = build(generated(label_noise="uniform", label_noise_share=0.5), tiny_model)
    assert task.training_labels.column_names == ["row", "text", "label", "trusted_label", "is_corrupted"]
    names = task.model_init().config.id2label
    assert list(task.training_labels["label"]) == [names[label] for label in task.train_dataset["labels"]]
    assert sum(task.training_labels["is_corrupted"]) == len(task.train_dataset) / 2


def test_without_a_meta_module_the_meta_set_is_put_aside_all_the_same(generated, tiny_model):
    noise = {"label_noise": "flip", "label_noise_share": 0.4}
    method = build(generated(**noise), tiny_model)
    plain = build(generated(**noise), tiny_model, with_meta=False)
    assert plain.meta_dataset is None
    assert plain.train_dataset.to_list() == method.train_dataset.to_list()
    assert len(plain.train_dataset) == 108
    assert (plain.baseline, plain.pipeline_tag) == ("plain training", "text-classification")


def test_the_baseline_on_both_sets_adds_the_meta_rows_with_trusted_labels(generated, tiny_model):
    noise = {"label_noise": "flip", "label_noise_share": 0.4, "train_on_meta": True}
    method = build(generated(**noise), tiny_model)
    both = build(generated(**noise), tiny_model, with_meta=False)
    assert both.train_dataset.to_list() == [*method.train_dataset.to_list(), *method.meta_dataset.to_list()]
    assert not any(both.training_labels["is_corrupted"][108:])
    assert len(method.train_dataset) == 108


def test_the_baseline_on_the_meta_set_alone_has_as_many_steps_as_that_on_the_noisy_set(generated, tiny_model):
    noise = {"label_noise": "flip", "label_noise_share": 0.4, "train_on_meta_alone": True}
    method, alone = (build(generated(**noise), tiny_model, with_meta=with_meta) for with_meta in (True, False))
    trusted = method.meta_dataset.to_list()
    assert len(method.train_dataset) == 108
    assert alone.train_dataset.to_list() == trusted * math.ceil(108 / len(trusted))
    assert len(alone.training_labels) == len(alone.train_dataset)
    assert not any(alone.training_labels["is_corrupted"])
    assert alone.baseline == "plain training on the meta set"


def test_a_meta_module_that_tells_trusted_rows_trains_on_both_sets(generated, tiny_model):
    noise = {"label_noise": "flip", "label_noise_share": 0.4, "train_on_meta": True}
    method = build(generated(**noise), tiny_model, tells_trusted=True)
    both = build(generated(**noise), tiny_model, with_meta=False)
    assert method.num_trusted == len(method.meta_dataset) == len(method.train_dataset) - 108
    assert method.train_dataset["is_trusted"][:] == [False] * 108 + [True] * method.num_trusted
    assert method.train_dataset.remove_columns("is_trusted").to_list() == both.train_dataset.to_list()
    assert method.training_labels.to_list() == both.training_labels.to_list()[:108]
    assert build(generated(), tiny_model, tells_trusted=True).num_trusted == both.num_trusted == 0


def test_an_epoch_goes_through_the_meta_set_several_times(generated, tiny_model):
    settings = generated(label_noise="flip", label_noise_share=0.4, train_on_meta=True, meta_repeats=3)
    method = build(settings, tiny_model, tells_trusted=True)
    both = build(settings, tiny_model, with_meta=False)
    trusted = method.meta_dataset.to_list()
    assert method.train_dataset.remove_columns("is_trusted").to_list() == both.train_dataset.to_list()
    assert both.train_dataset.to_list()[108:] == trusted * 3
    assert method.num_trusted == sum(method.train_dataset["is_trusted"]) == 3 * len(trusted)
    assert len(method.training_labels) == 108


def test_trainer_trains_and_scores_with_the_tasks_metrics(generated, tiny_model, tmp_path):
    task = build(generated(), tiny_model, with_meta=False)
    run = trainer(task, tmp_path)
    run.train()
    scores = run.evaluate()
    assert {"eval_accuracy", "eval_macro_f1"} <= set(scores)
    assert run.predict(task.test_dataset).predictions.shape == (30, 4)


def test_models_of_one_task_start_alike_and_those_of_another_seed_do_not(generated, tiny_model):
    task = build(generated(), tiny_model)
    first = task.model_init()
    torch.manual_seed(6)
    second = task.model_init()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = build(generated(), tiny_model, seed=2).model_init()
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert first.config.id2label == {0: "business", 1: "culture", 2: "science", 3: "sport"}


def test_a_pretrained_model_is_loaded_from_its_folder_with_a_new_head_of_the_right_size(
    generated, tiny_model, write_rows, tmp_path
):
    scratch = build(generated(), tiny_model)
    saved = scratch.model_init()
    saved.save_pretrained(tmp_path)
    scratch.processing_class.save_pretrained(tmp_path)
    file = write_rows("train.jsonl", [{"text": "a b c", "label": i % 2} for i in range(20)])
    arguments = TextClassificationArguments(train_file=file, num_meta_examples=4, max_length=16)
    loaded = build(arguments, ModelArguments(model_name_or_path=str(tmp_path))).model_init()
    assert loaded.config.num_labels == loaded.classifier.out_features == 2
    assert torch.equal(loaded.get_input_embeddings().weight, saved.get_input_embeddings().weight)


def test_texts_are_cut_to_the_length_that_the_settings_name(generated, tiny_model):
    task = build(generated(max_length=6), tiny_model)
    assert max(map(len, task.train_dataset["input_ids"])) == max(map(len, task.test_dataset["input_ids"])) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 600}, "max_length=600 is more than the 512 sub-tokens"),
        ({"num_meta_examples": 0}, "num_meta_examples must be at least 1, got 0"),
        ({"num_meta_examples": 400}, "num_meta_examples=400 takes 100 training rows of each class"),
    ],
)
def test_settings_that_do_not_fit_data_or_model_are_refused(generated, tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        build(generated(**changes), tiny_model)


def test_a_plain_run_may_do_without_a_meta_set(generated, tiny_model):
    assert len(build(generated(num_meta_examples=0), tiny_model, with_meta=False).train_dataset) == 120


def test_labels_that_no_one_checked_have_no_trusted_ones_beside_them(tiny_model, write_rows):
    doubtful = write_rows("train.jsonl", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(9)])
    arguments = TextClassificationArguments(train_file=doubtful, meta_file=doubtful, num_meta_examples=0)
    assert build(arguments, tiny_model).training_labels.column_names == ["row", "text", "label"]

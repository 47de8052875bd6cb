from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from pictures import picture
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor

from meta_trainer.tasks import ModelArguments, Task
from meta_trainer.tasks.image_classification import ImageClassificationArguments, build_image_classification_task


def build(arguments: ImageClassificationArguments, model: ModelArguments | None = None, **changes: Any) -> Task:
    settings = {"seed": 1, "with_meta": True} | changes
    return build_image_classification_task(arguments, model or ModelArguments(), **settings)


def trainer(task: Task, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        **({"max_steps": 2, "save_strategy": "no"} | settings),
    )  # fmt: skip
    return Trainer(
        model=task.model_init(), args=arguments, train_dataset=task.train_dataset, eval_dataset=task.test_dataset,
        data_collator=task.data_collator, compute_metrics=task.compute_metrics,
        processing_class=task.processing_class,
    )  # fmt: skip


def test_batches_hold_what_the_model_takes_and_nothing_of_the_noise(small, tmp_path):
    task = build(small(label_noise="flip", label_noise_share=0.4))
    batch = next(iter(trainer(task, tmp_path).get_train_dataloader()))
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (4, 1, 16, 16)
    assert batch["labels"].tolist() == [int(label) for label in batch["labels"]]


def test_the_record_of_the_labels_goes_with_the_training_rows(small):
    task = build(small(label_noise="uniform", label_noise_share=0.5))
    assert task.training_labels.column_names == ["row", "label", "trusted_label", "is_corrupted"]
    names = task.model_init().config.id2label
    assert task.training_labels["label"][:] == [names[label] for label in task.train_dataset["labels"]]
    wrong = [row["label"] != row["trusted_label"] for row in task.training_labels.to_list()]
    assert task.training_labels["is_corrupted"][:] == wrong
    assert sum(wrong) == 16
    images = torch.stack([row["pixel_values"] for row in task.train_dataset])
    expected = np.stack([picture(row) for row in task.training_labels["row"]])
    assert_close(images[:, 0], torch.tensor(expected / 255 / 0.5 - 1).float())


def test_only_training_images_are_augmented_and_only_target_images_turned(small):
    plain = build(small())
    changed = build(small(rotate_target_degrees=180, random_crop_padding=3))
    for kind in ("meta_dataset", "test_dataset"):
        before, after = (getattr(task, kind)[:]["pixel_values"] for task in (plain, changed))
        assert_close(after, torch.rot90(before, 2, (2, 3)))
    assert not torch.equal(plain.train_dataset[:]["pixel_values"], changed.train_dataset[:]["pixel_values"])
    turned = build(small(rotate_train_degrees=90)).train_dataset[:]["pixel_values"]
    assert_close(turned, torch.rot90(plain.train_dataset[:]["pixel_values"], 1, (2, 3)))


def test_without_a_meta_module_the_meta_set_is_put_aside_all_the_same(small):
    method, plain = build(small()), build(small(), with_meta=False)
    assert plain.meta_dataset is None
    assert plain.training_labels.to_list() == method.training_labels.to_list()
    assert (plain.baseline, plain.pipeline_tag) == ("plain training", "image-classification")


def test_the_baseline_on_both_sets_adds_the_meta_rows_with_trusted_labels(small):
    noise = {"label_noise": "flip", "label_noise_share": 0.4, "train_on_meta": True}
    method, both = build(small(**noise)), build(small(**noise), with_meta=False)
    assert (len(method.train_dataset), len(both.train_dataset)) == (32, 40)
    assert_close(both.train_dataset[32:]["pixel_values"], method.meta_dataset[:]["pixel_values"])
    assert both.train_dataset["labels"][32:] == method.meta_dataset["labels"][:]
    assert both.training_labels.to_list()[:32] == method.training_labels.to_list()
    assert not any(both.training_labels["is_corrupted"][32:])


def test_the_baseline_on_the_meta_set_alone_has_as_many_steps_as_that_on_the_noisy_set(small):
    noise = {"label_noise": "flip", "label_noise_share": 0.4, "train_on_meta_alone": True}
    method, alone = build(small(**noise)), build(small(**noise), with_meta=False)
    assert (len(method.train_dataset), len(method.meta_dataset), len(alone.train_dataset)) == (32, 8, 32)
    assert_close(alone.train_dataset[:]["pixel_values"], method.meta_dataset[:]["pixel_values"].repeat(4, 1, 1, 1))
    assert alone.train_dataset["labels"][:] == method.meta_dataset["labels"][:] * 4
    assert alone.training_labels["label"][:] == alone.training_labels["trusted_label"][:]
    assert len(alone.training_labels) == 32


def test_a_meta_module_that_tells_trusted_images_trains_on_both_sets(small):
    noise = {"label_noise": "flip", "label_noise_share": 0.4, "train_on_meta": True, "meta_repeats": 2}
    method, both = build(small(**noise), tells_trusted=True), build(small(**noise), with_meta=False)
    assert (len(method.train_dataset), method.num_trusted, both.num_trusted) == (48, 16, 0)
    assert method.train_dataset["is_trusted"][:] == [False] * 32 + [True] * 16
    assert_close(method.train_dataset[:]["pixel_values"], both.train_dataset[:]["pixel_values"])
    assert method.training_labels.to_list() == both.training_labels.to_list()[:32]
    batch = method.data_collator([method.train_dataset[i] for i in (0, 39)])
    assert batch["is_trusted"].tolist() == [False, True]


def test_a_file_of_trusted_images_is_the_meta_set_and_leaves_all_others_to_train_on(small, write_images):
    checked = small(meta_file=write_images("checked.parquet", range(200, 206)), train_on_meta=True, num_meta_examples=0)
    method, both = build(checked), build(checked, with_meta=False)
    assert (len(method.train_dataset), len(method.meta_dataset), len(both.train_dataset)) == (40, 6, 46)
    expected = np.stack([picture(number) for number in range(200, 206)])
    for found in (method.meta_dataset[:]["pixel_values"], both.train_dataset[40:]["pixel_values"]):
        assert_close(found[:, 0], torch.tensor(expected / 255 / 0.5 - 1).float())
    assert method.meta_dataset["labels"][:] == [0, 1] * 3
    assert method.training_labels.column_names == both.training_labels.column_names == ["row", "label"]


def test_beside_a_file_of_trusted_images_others_may_have_noisy_labels_alone(small, write_images):
    def without_label(name: str, numbers: range) -> str:
        path = write_images(name, numbers, crowd=[int(i % 3 == 0) for i in numbers])
        Dataset.from_parquet(path).remove_columns("label").to_parquet(path)
        return path

    files = [without_label("a.parquet", range(20)), without_label("b.parquet", range(20, 32))]
    settings = {"train_file": files, "train_label_column": "crowd", "test_file": None}
    checked = write_images("checked.parquet", range(200, 206))
    with pytest.raises(ValueError, match=r"No label of .*a\.parquet.* \('0, 1'\) is one of .* \('left, right'\)"):
        build(small(meta_file=checked, **settings))
    Dataset.from_parquet(checked).cast_column("label", Value("int64")).to_parquet(checked)
    task = build(small(meta_file=checked, **settings))
    assert task.training_labels.column_names == ["row", "label"]
    assert task.training_labels["label"][:] == [str(int(row % 3 == 0)) for row in task.training_labels["row"]]


@pytest.mark.parametrize("image_model", ["lenet", "resnet32"])
def test_trainer_learns_which_half_is_bright(small, tmp_path, image_model):
    task = build(small(image_model=image_model), with_meta=False)
    run = trainer(task, tmp_path, learning_rate=3e-3, max_steps=16)
    run.train()
    scores = run.evaluate()
    assert scores["eval_accuracy"] > 0.9
    assert run.predict(task.test_dataset).predictions.shape == (10, 2)


def test_models_of_one_task_start_alike_and_those_of_another_seed_do_not(small):
    task = build(small())
    first = task.model_init()
    torch.manual_seed(6)
    second = task.model_init()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = build(small(), seed=2).model_init()
    assert not torch.equal(first.classifier[0].weight, other.classifier[0].weight)
    assert first.config.id2label == {0: "left", 1: "right"}
    assert (first.config.image_size, first.config.num_channels) == (16, 1)


def test_a_resumed_run_sees_the_crops_of_one_that_went_on(small, tmp_path):
    task = build(small(random_crop_padding=3, random_flip=True), with_meta=False)
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}

    def run(folder: str, checkpoint: str | None = None) -> torch.nn.Module:
        trained = trainer(task, tmp_path / folder, **settings)
        trained.train(resume_from_checkpoint=checkpoint)
        return trained.model

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-3"))
    for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_pretrained_model_gets_a_new_head_and_its_own_processor(small, tmp_path):
    config = ViTConfig(
        image_size=12, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    saved = ViTForImageClassification(config)
    saved.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.2] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path)
    task = build(small(), ModelArguments(model_name_or_path=str(tmp_path)), with_meta=False)
    assert task.train_dataset[:2]["pixel_values"].shape == (2, 3, 12, 12)
    assert task.processing_class.image_mean[0] == 0.2
    model = task.model_init()
    assert model.classifier.out_features == 2
    assert torch.equal(model.vit.embeddings.cls_token, saved.vit.embeddings.cls_token)
    run = trainer(task, tmp_path / "run")
    run.train()
    assert run.predict(task.test_dataset).predictions.shape == (10, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_meta_examples": 0}, "num_meta_examples must be at least 1, got 0"),
        ({"num_meta_examples": 44}, "num_meta_examples=44 takes 22 training rows of each class"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "image_mean has 3 channels, but images have 1"),
        ({"random_crop_padding": 16}, "random_crop_padding=16 must be less than the 16 pixels"),
        ({"image_size": 12}, r"`image_size` of a LeNet should be at least 16, got 12\.$"),
    ],
)
def test_settings_that_do_not_fit_data_or_model_are_refused(small, changes, message):
    with pytest.raises(ValueError, match=message):
        build(small(**changes))


def test_an_image_that_is_too_small_is_told_from_a_setting(small, write_images):
    files = [write_images("a.parquet", range(20), size=9)]
    with pytest.raises(ValueError, match=r"at least 16, got 9\. That is the size of the first image: image_size sets"):
        build(small(train_file=files))
    assert build(small(train_file=files, image_size=16)).model_init().config.image_size == 16


@pytest.mark.parametrize("seed", range(4))
def test_size_and_channels_are_those_of_the_first_image_whatever_the_seed(small, write_images, seed):
    colours = write_images("colours.parquet", range(2), channels=3, size=20)
    files = [colours, write_images("grey.parquet", range(2, 40))]
    config = build(small(train_file=files, subset_seed=seed, max_train_examples=4)).model_init().config
    assert (config.image_size, config.num_channels) == (20, 3)


def test_a_model_without_an_image_processor_is_refused(small, tmp_path):
    ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="No image processor can be loaded from"):
        build(small(), ModelArguments(model_name_or_path=str(tmp_path)))

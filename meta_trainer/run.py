"""Run a recipe: from its settings to trained models, a table, a picture and a JSON file."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import yaml
from rich.console import Console
from transformers import IntervalStrategy, PreTrainedModel, set_seed
from transformers.utils import logging

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.checkpoint import check_complete, checkpoints, is_half_written, newest_complete
from meta_trainer.example_weights import weigh_examples
from meta_trainer.meter import StepMeter
from meta_trainer.modules import (
    DomainWeights,
    FeatureWiseTransform,
    InputRotation,
    LearnedWeightDecay,
    MetaModule,
    MetaWeightNet,
    RepresentationTransform,
)
from meta_trainer.modules.feature_wise_transform import find_channels
from meta_trainer.per_example_loss import PerSentenceLoss
from meta_trainer.recipe import TELLS_TRUSTED, MetaModuleArguments, Recipe
from meta_trainer.report import MethodResult, draw_results, results_table, write_results
from meta_trainer.tasks import Task
from meta_trainer.tasks.few_shot import FewShotArguments, build_few_shot_task
from meta_trainer.tasks.image_classification import ImageClassificationArguments, build_image_classification_task
from meta_trainer.tasks.language_modeling import LanguageModelingArguments, build_language_modeling_task
from meta_trainer.tasks.ner import NerArguments, build_ner_task
from meta_trainer.tasks.noisy_ner import NoisyNerArguments, build_noisy_ner_task
from meta_trainer.tasks.text_classification import build_text_classification_task
from meta_trainer.trainer import MetaTrainer
from meta_trainer.weights_report import TRAINING_WEIGHTS, report_weights

logger = logging.get_logger(__name__)

TRAINING_LABELS = "training_labels.parquet"


@dataclass(frozen=True)
class PreparedMethod:
    """A method that is ready to train."""

    name: str
    task: Task
    trainer: MetaTrainer
    meter: StepMeter


def prepare(recipe: Recipe) -> list[PreparedMethod]:
    """Load data and models of every method that the recipe trains, in the order of training.

    Raises:
        ValueError: If data, model and settings do not fit together.
    """
    plans = [(recipe.training, recipe.module.meta_module)]
    if recipe.run.compare_with_baseline:
        training = copy.copy(recipe.training)
        training.output_dir = str(Path(str(recipe.training.output_dir)) / "baseline")
        plans.insert(0, (training, []))
    return [_prepare_method(recipe, *plan) for plan in plans]


def run(recipe: Recipe, methods: list[PreparedMethod], console: Console) -> list[MethodResult]:
    """Train and score every method; write the report into the recipe's output folder and print its table."""
    results = []
    for method in methods:
        if method.trainer.is_world_process_zero():
            console.rule(method.name)
        results.append(_train(method, recipe))
    if methods[0].trainer.is_world_process_zero():
        _write_report(recipe, results, methods[0].task.main_metric, console)
        if _weighs_examples(methods[-1].trainer) and methods[-1].task.training_labels is not None:
            console.print(f"{TRAINING_WEIGHTS} there has the weight of every example, the most suspicious label first.")
    return results


def build_task(recipe: Recipe, meta_module_names: list[str]) -> Task:
    """Load what the recipe's task needs, for a run that learns these meta modules or none.

    Raises:
        ValueError: If data, model and settings do not fit together.
    """
    seed, with_meta = recipe.training.seed, bool(meta_module_names)
    tells_trusted = meta_module_names == [TELLS_TRUSTED]
    if isinstance(recipe.task, NerArguments):
        return build_ner_task(
            recipe.task,
            recipe.model,
            seed=seed,
            with_meta=with_meta,
            meta_batch_size=recipe.training.per_device_meta_batch_size,
            mark_source="representation_transform" in meta_module_names,
            mark_target=TELLS_TRUSTED in meta_module_names,
        )
    if isinstance(recipe.task, ImageClassificationArguments):
        return build_image_classification_task(
            recipe.task, recipe.model, seed=seed, with_meta=with_meta, tells_trusted=tells_trusted
        )
    if isinstance(recipe.task, FewShotArguments):
        return build_few_shot_task(
            recipe.task,
            recipe.model,
            seed=seed,
            with_meta=with_meta,
            sampling=recipe.training.train_sampling_strategy,
        )
    if isinstance(recipe.task, LanguageModelingArguments):
        return build_language_modeling_task(recipe.task, recipe.model, seed=seed, with_meta=with_meta)
    if isinstance(recipe.task, NoisyNerArguments):
        return build_noisy_ner_task(
            recipe.task, recipe.model, seed=seed, with_meta=with_meta, tells_trusted=tells_trusted
        )
    return build_text_classification_task(
        recipe.task, recipe.model, seed=seed, with_meta=with_meta, tells_trusted=tells_trusted
    )


def build_meta_modules(
    arguments: MetaModuleArguments, model: PreTrainedModel, seed: int, domains: Sequence[str] = ()
) -> list[MetaModule]:
    """The meta modules that a recipe names, of the sizes of `model`; the same for the same seed."""
    builders: dict[str, Callable[[], MetaModule]] = {
        "representation_transform": lambda: RepresentationTransform(
            model.config.hidden_size, arguments.rtn_bottleneck_size, arguments.layers, arguments.rtn_initialization
        ),
        "domain_weights": lambda: DomainWeights(list(domains)),
        "learned_weight_decay": lambda: LearnedWeightDecay(
            arguments.weight_decay_groups, arguments.initial_weight_decay
        ),
        "meta_weight_net": lambda: MetaWeightNet(
            arguments.weight_net_hidden_size,
            arguments.weight_net_loss_input,
            model.config.num_labels if arguments.weight_net_reads_label else None,
        ),
        "input_rotation": InputRotation,
        "feature_wise_transform": lambda: FeatureWiseTransform(find_channels(model, arguments.feature_wise_layers)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [builders[name]() for name in arguments.meta_module]


def _prepare_method(recipe: Recipe, training: MetaTrainingArguments, meta_module_names: list[str]) -> PreparedMethod:
    training.resume_from_checkpoint = _find_checkpoint(
        training, recipe.run.compare_with_baseline, bool(meta_module_names)
    )
    if training.device.type == "cpu":
        # Pinned memory is for transfers to an accelerator; without one it is only warned about.
        training.dataloader_pin_memory = False
    task = build_task(recipe, meta_module_names)
    strategy = IntervalStrategy(training.eval_strategy)
    if task.eval_dataset is None and strategy is not IntervalStrategy.NO:
        raise ValueError(
            f"eval_strategy={strategy.value!r} scores a validation set during training, of which the data "
            "settings name none: name one, or set eval_strategy to no."
        )
    model = task.model_init()
    modules = build_meta_modules(recipe.module, model, training.seed, task.domains) if meta_module_names else []
    whole_sentences = "meta_weight_net" in meta_module_names and recipe.module.weight_net_level == "sentence"
    meter = StepMeter()
    trainer = MetaTrainer(
        model=model,
        args=training,
        # A single module is saved under its own name, not as a list of one.
        meta_module=modules[0] if len(modules) == 1 else modules or None,
        meta_dataset=task.meta_dataset,
        per_example_loss=PerSentenceLoss(model, training.label_smoothing_factor) if whole_sentences else None,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        processing_class=task.processing_class,
        data_collator=task.data_collator,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        callbacks=[meter],
    )
    # The heads of these tasks average over their batch, whatever number of labels Trainer tells them: it is to divide
    # their loss by the number of micro-batches then, and not to multiply it by that of processes.
    trainer.model_accepts_loss_kwargs = False
    name = task.baseline if recipe.run.compare_with_baseline and not meta_module_names else recipe.run.method
    return PreparedMethod(name, task, trainer, meter)


def _find_checkpoint(training: MetaTrainingArguments, one_of_two: bool, with_meta: bool) -> str | None:
    """Folder of the checkpoint to resume from; ``last`` stands for the last complete one in the output folder.

    A run that was killed before its first checkpoint was complete starts anew, and so does, of two methods, the one
    that had not come to a checkpoint.
    """
    setting, output_dir = training.resume_from_checkpoint, Path(str(training.output_dir))
    if setting is None:
        return None
    if setting in ("last", "true", "True"):
        found = checkpoints(output_dir)
        if not found and not one_of_two:
            raise ValueError(f"resume_from_checkpoint={setting!r}: there is no checkpoint in {output_dir}.")
        if found and all(is_half_written(folder) for folder in found):
            logger.warning(f"All checkpoints in {output_dir} are half-written: training starts anew.")
            return None
        checkpoint = newest_complete(output_dir, with_manifest=with_meta)
        return None if checkpoint is None else str(checkpoint)
    if one_of_two:
        raise ValueError(
            f"With `compare_with_baseline`, `resume_from_checkpoint` should be 'last', got {setting!r}: each method "
            "has checkpoints of its own."
        )
    if not Path(setting).is_dir():
        raise ValueError(f"resume_from_checkpoint={setting!r}: there is no checkpoint of that name.")
    if with_meta:
        check_complete(Path(setting))
    return setting


def _train(method: PreparedMethod, recipe: Recipe) -> MethodResult:
    trainer, task = method.trainer, method.task
    # What was built before must not change the random numbers of this training.
    set_seed(trainer.args.seed)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model()
    found = _report_training_rows(trainer, task)
    dataset = task.test_dataset if task.test_dataset is not None else task.eval_dataset
    metrics = {} if dataset is None else trainer.evaluate(dataset, metric_key_prefix="test")
    scores = {**{key.removeprefix("test_"): float(value) for key, value in metrics.items()}, **found}
    # Trainer takes a model without a folder for one that was fine-tuned; this one has just been saved.
    config: Any = trainer.model.config
    config.name_or_path = str(trainer.args.output_dir)
    trainer.create_model_card(
        finetuned_from=recipe.model.model_name_or_path, tasks=task.pipeline_tag, dataset=recipe.task.dataset_name
    )
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return MethodResult(
        name=method.name,
        metrics=scores,
        step_ms=method.meter.step_ms,
        peak_memory_mib=method.meter.peak_memory_mib,
        steps=trainer.state.global_step,
        seconds=seconds,
        history=trainer.state.log_history,
    )


def _report_training_rows(trainer: MetaTrainer, task: Task) -> dict[str, float]:
    """Write what is known of the training rows, their learned weights included; returns scores of the weights."""
    labels, folder = task.training_labels, Path(str(trainer.args.output_dir))
    if labels is None:
        return {}
    if not _weighs_examples(trainer):
        if trainer.is_world_process_zero():
            pyarrow.parquet.write_table(labels.with_format("arrow")[:], folder / TRAINING_LABELS)
        return {}
    doubtful = task.train_dataset
    if task.num_trusted:
        doubtful = doubtful.select(range(len(doubtful) - task.num_trusted))
    found = weigh_examples(trainer, doubtful)
    if not trainer.is_world_process_zero():
        return {}
    config: Any = trainer.model.config
    return report_weights(found, labels, config.id2label, trainer.state.log_history, folder)


def _weighs_examples(trainer: MetaTrainer) -> bool:
    return trainer.meta_module is not None and trainer.meta_module.weighs_examples


def _write_report(recipe: Recipe, results: list[MethodResult], metric: str, console: Console) -> None:
    folder = Path(str(recipe.training.output_dir))
    settings: dict[str, Any] = recipe.settings
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    write_results(results, folder / "results.json", metric=metric, settings=settings)
    if all(metric in result.metrics for result in results):
        draw_results(results, metric, folder / "results.png")
        console.print(results_table(results, metric, recipe.run.description or recipe.run.method))
    console.print(f"Model, meta module, model card and results are in [bold]{folder}[/bold].")

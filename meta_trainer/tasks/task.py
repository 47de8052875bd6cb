"""What a training run needs of a task, from data to metric."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class Task:
    """A task, ready to hand to a trainer.

    Attributes:
        model_init: Gives the same fresh model at each call.
        processing_class: The tokenizer or image processor, saved beside the model, or None.
        train_dataset: Rows of the training stream; the collator may add rows to each batch.
        meta_dataset: The trusted set, or None when the collator draws the meta batches itself.
        eval_dataset: Rows scored during training, or None.
        test_dataset: Rows scored once at the end, or None.
        data_collator: Turns rows of any of these sets into a batch.
        compute_metrics: Scores of a prediction, by name.
        main_metric: Name of the score that says which model is better; higher is better.
        pipeline_tag: What the Hub calls the task.
        baseline: What the same run without a meta module is called in tables.
        domains: Names of the sources that the column ``domain`` of the training rows numbers; empty without one.
        preprocess_logits_for_metrics: Makes less of the logits of an evaluation batch before they are kept, or None.
        num_trusted: Rows at the end of the training stream that are of the meta set, and marked as such.
        training_labels: One row for each training row but those, or for each labelled token of them, in their order:
            ``row`` (number in the file, from 0), what a reader recognises it by, ``label`` and, where it is known,
            ``trusted_label`` and ``is_corrupted``. Kept beside the model. None where a task knows nothing of that kind.
    """

    model_init: Callable[[], PreTrainedModel]
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin | None
    train_dataset: Dataset
    meta_dataset: Dataset | None
    eval_dataset: Dataset | None
    test_dataset: Dataset | None
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    main_metric: str
    pipeline_tag: str
    baseline: str
    domains: tuple[str, ...] = ()
    preprocess_logits_for_metrics: Callable[[Any, Tensor], Tensor] | None = None
    num_trusted: int = 0
    training_labels: Dataset | None = None

"""Cross-lingual named entity recognition as a task."""

from functools import partial

from datasets import Dataset
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from meta_trainer.tasks.classifier import make_config, make_model
from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.ner.arguments import NerArguments
from meta_trainer.tasks.ner.collator import SourceTargetCollator, mark_rows
from meta_trainer.tasks.ner.encoding import encode
from meta_trainer.tasks.ner.loading import load_ner_data
from meta_trainer.tasks.ner.metrics import EntityScores
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tokenizer import make_tokenizer
from meta_trainer.tasks.task import Task
from meta_trainer.tasks.tokenizer import check_max_length

EVALUATION_LENGTH = 512  # sub-tokens of an evaluation sentence, as in the official code of MetaXL


def build_ner_task(
    ner: NerArguments,
    model: ModelArguments,
    *,
    seed: int,
    with_meta: bool,
    meta_batch_size: int,
    mark_source: bool = True,
    mark_target: bool = False,
) -> Task:
    """Load data and tokenizer, and put together what a run needs.

    Args:
        ner: Data and batches.
        model: Base model.
        seed: Seed of the weights that are not pretrained and of the draws of target sentences.
        with_meta: Whether a meta module is trained. If not, batches hold source and target sentences, nothing
            else, and every target sentence is trained on.
        meta_batch_size: Target sentences of a meta batch; without a meta module they are drawn and not used.
        mark_source: Whether batches for a meta module say which of their rows are source sentences.
        mark_target: Whether they say which are target sentences, and so to be trusted.

    Returns:
        The task. Its training rows are the source sentences; the collator adds the target sentences.

    Raises:
        ValueError: If data, settings and model do not fit each other.
    """
    if with_meta and meta_batch_size < 1:
        raise ValueError(f"A meta batch needs at least one sentence, got meta_batch_size={meta_batch_size}.")
    data = load_ner_data(ner)
    tokenizer = make_tokenizer(model, [data.source_train, data.target_train])
    config = make_config(model, data.tags, tokenizer)
    limit = check_max_length(ner.max_length, tokenizer, config)

    def encoded(sentences: Sentences | None, length: int) -> Dataset | None:
        return None if sentences is None else encode(sentences, tokenizer, data.tags, length)

    target_train, meta_dataset = split_target(data.target_train, ner, with_meta)
    collator = SourceTargetCollator(
        DataCollatorForTokenClassification(tokenizer),
        encode(target_train, tokenizer, data.tags, ner.max_length),
        ner.target_batch_size,
        meta_batch_size if ner.meta_split == "per_batch" else 0,
        seed,
        mark_source=with_meta and mark_source,
        mark_target=with_meta and mark_target,
        carry_meta=with_meta,
    )
    return Task(
        model_init=partial(make_model, AutoModelForTokenClassification, model, config, seed),
        processing_class=tokenizer,
        train_dataset=mark_rows(encode(data.source_train, tokenizer, data.tags, ner.max_length)),
        meta_dataset=encoded(meta_dataset, ner.max_length),
        eval_dataset=encoded(data.target_validation, min(EVALUATION_LENGTH, limit)),
        test_dataset=encoded(data.target_test, min(EVALUATION_LENGTH, limit)),
        data_collator=collator,
        compute_metrics=EntityScores(data.tags, ner.metrics, model.trust_remote_code),
        main_metric="f1",
        pipeline_tag="token-classification",
        baseline="joint training",
    )


def split_target(target: Sentences, ner: NerArguments, with_meta: bool) -> tuple[Sentences, Sentences | None]:
    """Set the meta sentences of a fixed split apart from those to train on.

    Raises:
        ValueError: If one of the two parts would be empty.
    """
    if not with_meta or ner.meta_split == "per_batch":
        return target, None
    size = round(ner.meta_fraction * len(target))
    if not 0 < size < len(target):
        raise ValueError(
            f"meta_fraction={ner.meta_fraction} of {len(target)} target sentences leaves {size} for the "
            f"meta set and {len(target) - size} to train on; both need at least one."
        )
    return target.select(range(size, len(target))), target.select(range(size))

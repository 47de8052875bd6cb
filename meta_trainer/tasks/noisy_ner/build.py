"""Named entity recognition with noisy tags as a task."""

from functools import partial

from datasets import Dataset
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from meta_trainer.tasks.classifier import make_config, make_model
from meta_trainer.tasks.labelled_rows import mark_trusted
from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.ner.build import EVALUATION_LENGTH
from meta_trainer.tasks.ner.encoding import encode
from meta_trainer.tasks.ner.metrics import EntityScores
from meta_trainer.tasks.ner.sentences import Sentences, concatenate
from meta_trainer.tasks.ner.tokenizer import make_tokenizer
from meta_trainer.tasks.noisy_ner.arguments import NoisyNerArguments
from meta_trainer.tasks.noisy_ner.loading import load_noisy_ner_data
from meta_trainer.tasks.noisy_ner.record import record_labels
from meta_trainer.tasks.task import Task
from meta_trainer.tasks.tokenizer import check_max_length


def build_noisy_ner_task(
    arguments: NoisyNerArguments, model: ModelArguments, *, seed: int, with_meta: bool, tells_trusted: bool = False
) -> Task:
    """Load data and tokenizer, and put together what a run needs.

    Args:
        arguments: Data, meta set and noise.
        model: Base model.
        seed: Seed of the weights that are not pretrained, and of the noise where the settings have none for it.
        with_meta: Whether a meta module is trained. If not, the meta set is put aside all the same, or trained on
            where ``train_on_meta`` or ``train_on_meta_alone`` says so.
        tells_trusted: Whether the meta module tells trusted rows from others, so that ``train_on_meta`` is for it, too.

    Returns:
        The task. Its training tags may be wrong, those of all other sets are the trusted ones.

    Raises:
        ValueError: If data, settings and model do not fit each other.
    """
    if with_meta:
        arguments.check_meta_set()
    data = load_noisy_ner_data(arguments, seed)
    # On both sets, whichever is trained on: methods that are compared read the same sub-tokens.
    tokenizer = make_tokenizer(model, [data.train, *([data.meta] if len(data.meta) else [])])
    config = make_config(model, data.tags, tokenizer)
    evaluation_length = min(EVALUATION_LENGTH, check_max_length(arguments.max_length, tokenizer, config))
    parts = partial(arguments.training_parts, with_meta=with_meta, tells_trusted=tells_trusted)
    train, trusted = (concatenate(parts(noisy, data.meta)) for noisy in (data.train, data.train_trusted))
    num_trusted = len(train) - len(data.train) if with_meta else 0
    recorded = (data.train, data.train_trusted) if num_trusted else (train, trusted)
    record = record_labels(*recorded, tokenizer, arguments.max_length)
    if arguments.meta_file and data.train.tags == data.train_trusted.tags:
        # Only the sentences of the file are trusted, and these are what they were.
        record = record.remove_columns(["trusted_label", "is_corrupted"])
    train_dataset = encode(train, tokenizer, data.tags, arguments.max_length)
    if num_trusted:
        train_dataset = mark_trusted(train_dataset, num_trusted)

    def encoded(sentences: Sentences | None, length: int) -> Dataset | None:
        return None if sentences is None else encode(sentences, tokenizer, data.tags, length)

    return Task(
        model_init=partial(make_model, AutoModelForTokenClassification, model, config, seed),
        processing_class=tokenizer,
        train_dataset=train_dataset,
        meta_dataset=encoded(data.meta, arguments.max_length) if with_meta else None,
        eval_dataset=encoded(data.validation, evaluation_length),
        test_dataset=encoded(data.test, evaluation_length),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=EntityScores(data.tags),
        main_metric="f1",
        pipeline_tag="token-classification",
        baseline=arguments.baseline,
        num_trusted=num_trusted,
        training_labels=record,
    )

"""Text classification with noisy labels as a task."""

from functools import partial

from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from meta_trainer.modules.domain_weights import DOMAIN_COLUMN
from meta_trainer.tasks.classifier import make_config, make_model
from meta_trainer.tasks.labelled_rows import label_record, mark_trusted
from meta_trainer.tasks.metrics import classification_scores
from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.task import Task
from meta_trainer.tasks.text_classification.arguments import TextClassificationArguments
from meta_trainer.tasks.text_classification.encoding import encode
from meta_trainer.tasks.text_classification.loading import TextData, load_text_data
from meta_trainer.tasks.tokenizer import check_max_length, load_tokenizer, train_byte_level_bpe


def build_text_classification_task(
    arguments: TextClassificationArguments,
    model: ModelArguments,
    *,
    seed: int,
    with_meta: bool,
    tells_trusted: bool = False,
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
        The task. Its training labels may be wrong, those of all other sets are the trusted ones.

    Raises:
        ValueError: If data, settings and model do not fit each other.
    """
    if with_meta:
        arguments.check_meta_set()
    data = load_text_data(arguments, seed)
    tokenizer = _make_tokenizer(model, data)
    config = make_config(model, data.classes, tokenizer)
    config.problem_type = "single_label_classification"
    check_max_length(arguments.max_length, tokenizer, config)
    parts = arguments.training_parts(data.train, data.meta, with_meta=with_meta, tells_trusted=tells_trusted)
    train = concatenate_datasets(parts)
    num_trusted = len(train) - len(data.train) if with_meta else 0

    train_dataset = encode(train, tokenizer, arguments.max_length)
    if num_trusted:
        train_dataset = mark_trusted(train_dataset, num_trusted)
    domains: list[str] = []
    if with_meta and arguments.domain_column is not None:
        domains = sorted(set(train["domain"]))
        train_dataset = train_dataset.add_column(DOMAIN_COLUMN, [domains.index(name) for name in train["domain"]])

    def encoded(rows: Dataset | None) -> Dataset | None:
        return None if rows is None else encode(rows, tokenizer, arguments.max_length)

    return Task(
        model_init=partial(make_model, AutoModelForSequenceClassification, model, config, seed),
        processing_class=tokenizer,
        train_dataset=train_dataset,
        meta_dataset=encoded(data.meta) if with_meta else None,
        eval_dataset=encoded(data.validation),
        test_dataset=encoded(data.test),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=classification_scores,
        main_metric="accuracy",
        pipeline_tag="text-classification",
        baseline=arguments.baseline,
        domains=tuple(domains),
        num_trusted=num_trusted,
        training_labels=label_record(data.train if num_trusted else train, data.classes),
    )


def _make_tokenizer(model: ModelArguments, data: TextData) -> PreTrainedTokenizerBase:
    name = model.tokenizer_name or model.model_name_or_path
    if name is not None:
        return load_tokenizer(name, model)
    # On both sets, whichever is trained on: methods that are compared read the same sub-tokens.
    return train_byte_level_bpe([*data.train["text"], *data.meta["text"]], model.vocab_size)

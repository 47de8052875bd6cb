"""Language modeling on a mixture of sources as a task."""

from functools import partial
from itertools import chain

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, default_data_collator

from meta_trainer.modules.domain_weights import DOMAIN_COLUMN
from meta_trainer.tasks.language_modeling.arguments import LanguageModelingArguments
from meta_trainer.tasks.language_modeling.decoder import make_decoder, make_decoder_config
from meta_trainer.tasks.language_modeling.loading import LanguageData, load_language_data
from meta_trainer.tasks.language_modeling.metrics import language_scores, token_scores
from meta_trainer.tasks.language_modeling.packing import pack
from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.task import Task
from meta_trainer.tasks.tokenizer import load_tokenizer, train_byte_level_bpe


def build_language_modeling_task(
    arguments: LanguageModelingArguments, model: ModelArguments, *, seed: int, with_meta: bool
) -> Task:
    """Load texts and tokenizer, and put together what a run needs.

    Args:
        arguments: Sources, trusted texts and blocks.
        model: Base model.
        seed: Seed of the weights that are not pretrained, and of the corruption where the settings have none for it.
        with_meta: Whether a meta module is trained. If not, the trusted texts are put aside all the same, or trained on
            where ``train_on_meta`` or ``train_on_meta_alone`` says so.

    Returns:
        The task. Each training row is a block of one source, whose number is in the column ``domain``.

    Raises:
        ValueError: If data, settings and model do not fit each other.
    """
    data = load_language_data(arguments, seed)
    if (with_meta or arguments.train_on_meta or arguments.train_on_meta_alone) and not data.meta:
        raise ValueError(
            "A meta module, train_on_meta and train_on_meta_alone need trusted texts: give trusted_source with "
            "num_meta_examples of at least 1, or meta_texts."
        )
    tokenizer = _make_tokenizer(model, data)
    config = make_decoder_config(model, tokenizer, arguments.block_length)

    def blocks(texts: list[str], name: str, domain: int | None = None) -> Dataset:
        rows = pack(texts, tokenizer, arguments.block_length, name)
        numbers = {} if domain is None else {DOMAIN_COLUMN: [domain] * len(rows)}
        return Dataset.from_dict({"input_ids": rows, "labels": rows, **numbers})

    domains = list(data.train)
    train = concatenate_datasets(
        [blocks(data.train[name], f"source {name!r}", number) for number, name in enumerate(domains)]
    )
    meta = blocks(data.meta, "meta set") if data.meta else None
    if meta is not None:
        train = concatenate_datasets(arguments.training_parts(train, meta, with_meta=with_meta))
    return Task(
        model_init=partial(make_decoder, model, config, seed),
        processing_class=tokenizer,
        train_dataset=train,
        meta_dataset=meta if with_meta else None,
        eval_dataset=blocks(data.validation, "validation_texts") if data.validation else None,
        test_dataset=blocks(data.test, "test_texts") if data.test else None,
        data_collator=default_data_collator,
        compute_metrics=language_scores,
        preprocess_logits_for_metrics=token_scores,
        main_metric="token_accuracy",
        pipeline_tag="text-generation",
        baseline=arguments.baseline,
        domains=tuple(domains),
    )


def _make_tokenizer(model: ModelArguments, data: LanguageData) -> PreTrainedTokenizerBase:
    name = model.tokenizer_name or model.model_name_or_path
    if name is not None:
        return load_tokenizer(name, model, needs_padding=False)
    # On the trusted texts too, whether they are trained on or not: methods that are compared read the same tokens.
    return train_byte_level_bpe([*chain.from_iterable(data.train.values()), *data.meta], model.vocab_size)

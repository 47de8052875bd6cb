"""The base model: a classifier of tokens, of whole texts or of images, pretrained or built from a config."""

from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BertConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.tokenizer import POSITIONS


def make_config(model: ModelArguments, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the config of a classifier over ``classes``: the pretrained model's, or that of a small BERT.

    Raises:
        ValueError: If the pretrained model cannot be found.
    """
    if model.model_name_or_path is None:
        return BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=model.intermediate_size,
            max_position_embeddings=POSITIONS,
            pad_token_id=tokenizer.pad_token_id,
            **class_maps(classes),
        )
    return pretrained_config(model, classes)


def class_maps(classes: Sequence[str]) -> dict[str, Any]:
    """Return what a config is told of the classes, in the order of their ids."""
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def pretrained_config(model: ModelArguments, classes: Sequence[str]) -> PreTrainedConfig:
    """Return the config of a pretrained model, with a head for ``classes``.

    Raises:
        ValueError: If the model cannot be found.
    """
    try:
        return AutoConfig.from_pretrained(
            str(model.model_name_or_path), trust_remote_code=model.trust_remote_code, **class_maps(classes)
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={model.model_name_or_path!r} is no model folder and no Hub model: {error}"
        ) from error


def make_model(auto_class: Any, model: ModelArguments, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Build the model; weights that are not pretrained depend on ``seed``, not on the global generator.

    Args:
        auto_class: The head: ``AutoModelForTokenClassification``, ``AutoModelForSequenceClassification``,
            ``AutoModelForImageClassification``.
        model: What to load, or to build from scratch.
        config: From :func:`make_config` or :func:`pretrained_config`, or of a model of this package.
        seed: Of the new weights.

    Raises:
        ValueError: If there are no weights, or a file of them is broken or would run code.
    """
    options = {"trust_remote_code": model.trust_remote_code, "attn_implementation": model.attn_implementation}
    # Named devices: with several of them, fork_rng would warn that it saves them all.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if model.model_name_or_path is None:
            return auto_class.from_config(config, **options)
        try:
            return auto_class.from_pretrained(
                model.model_name_or_path, config=config, ignore_mismatched_sizes=True, **options
            )
        except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
            raise ValueError(f"No weights can be loaded from {model.model_name_or_path!r}: {error}") from error

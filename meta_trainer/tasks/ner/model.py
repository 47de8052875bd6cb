"""The base model: a token classifier, pretrained or built from a config."""

from collections.abc import Sequence

import torch
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.ner.tokenizer import POSITIONS


def make_config(model: ModelArguments, tags: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the config of a classifier over ``tags``: the pretrained model's, or that of a small BERT.

    Raises:
        ValueError: If the pretrained model cannot be found.
    """
    id2label, label2id = dict(enumerate(tags)), {tag: number for number, tag in enumerate(tags)}
    if model.model_name_or_path is None:
        return BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=model.intermediate_size,
            max_position_embeddings=POSITIONS,
            pad_token_id=tokenizer.pad_token_id,
            id2label=id2label,
            label2id=label2id,
        )
    try:
        return AutoConfig.from_pretrained(
            model.model_name_or_path,
            trust_remote_code=model.trust_remote_code,
            id2label=id2label,
            label2id=label2id,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={model.model_name_or_path!r} is no model folder and no Hub model: {error}"
        ) from error


def make_model(model: ModelArguments, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Build the model; weights that are not pretrained depend on ``seed``, not on the global generator."""
    options = {"trust_remote_code": model.trust_remote_code, "attn_implementation": model.attn_implementation}
    # Named devices: with several of them, fork_rng would warn that it saves them all.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if model.model_name_or_path is None:
            return AutoModelForTokenClassification.from_config(config, **options)
        return AutoModelForTokenClassification.from_pretrained(
            model.model_name_or_path, config=config, ignore_mismatched_sizes=True, **options
        )

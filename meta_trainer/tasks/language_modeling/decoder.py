"""The base model: a causal language model, pretrained or built from a config."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from meta_trainer.tasks.classifier import make_model
from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.tokenizer import POSITIONS


def make_decoder_config(
    model: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_length: int
) -> PreTrainedConfig:
    """Return the config of a decoder: the pretrained model's, or that of a small Llama.

    Raises:
        ValueError: If the pretrained model cannot be found, or blocks are longer than what it can take.
    """
    if model.model_name_or_path is None:
        ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        # An output layer of its own makes a head that a meta step can perturb alone.
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_attention_heads,
            intermediate_size=model.intermediate_size,
            max_position_embeddings=max(POSITIONS, block_length),
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            **ends,
        )
    try:
        config = AutoConfig.from_pretrained(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={model.model_name_or_path!r} is no model folder and no Hub model: {error}"
        ) from error
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and block_length > positions:
        raise ValueError(f"block_length={block_length} is more than the {positions} tokens that the model can take.")
    return config


def make_decoder(model: ModelArguments, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Build the model; see :func:`~meta_trainer.tasks.classifier.make_model`.

    Raises:
        ValueError: If there are no weights, or a pretrained model reads the tokens that it is to predict.
    """
    decoder = make_model(AutoModelForCausalLM, model, config, seed)
    # Under ZeRO-3 no process has whole weights before training starts.
    if model.model_name_or_path is not None and not is_deepspeed_zero3_enabled():
        check_causal(decoder, model.model_name_or_path)
    return decoder


def check_causal(decoder: PreTrainedModel, name: str) -> None:
    """Refuse an encoder, which the library loads as a language model although it reads the tokens to come.

    The model stays as it is, and so do the generators of random numbers.

    Args:
        decoder: A model on the device where it was loaded.
        name: What an error calls it.

    Raises:
        ValueError: If a token changes what is predicted before it.
    """
    training, kernel = decoder.training, decoder.config._attn_implementation
    # Flash attention and its like run on accelerators only, where the model is not yet.
    replaced = kernel not in (None, "eager", "sdpa")
    if replaced:
        decoder.set_attn_implementation("eager")
    decoder.eval()
    size = decoder.config.get_text_config().vocab_size
    tokens = (size // 2 + torch.arange(5, device=decoder.device)) % size
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        # One row each: rounding may depend on the place in a batch.
        logits, others = (decoder(tokens[None, columns]).logits[0, :-1] for columns in ([0, 1, 2, 3], [0, 1, 2, 4]))
    decoder.train(training)
    if replaced:
        decoder.set_attn_implementation(kernel)
    # Rounding changes nothing or, where experts share a batch, the last digits; encoders change 1e-3 and more.
    tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps) * logits.abs().max()
    if (logits - others).abs().max() > tolerance:
        raise ValueError(
            f"model_name_or_path={name!r} should be a causal language model, got {type(decoder).__name__} that reads "
            "the tokens it is to predict: name a decoder, such as a GPT-2 or a Llama."
        )

"""The base model: a causal language model, pretrained or built from a config."""

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

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

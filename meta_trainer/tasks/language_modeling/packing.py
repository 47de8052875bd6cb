"""Texts to blocks of tokens of one length."""

from collections.abc import Sequence
from itertools import chain

from transformers import PreTrainedTokenizerBase


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_length: int, name: str) -> list[list[int]]:
    """Put texts one after another, each with an end token, and cut them into blocks; what is left over is dropped.

    Args:
        texts: Of one source, so that every block has a single one.
        tokenizer: Of the model; without an end token, a separator stands for it, and without that, nothing.
        block_length: Tokens of a block.
        name: What an error calls the texts.

    Raises:
        ValueError: If there are too few tokens for a block.
    """
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    ends = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None][:1]
    tokens = list(chain.from_iterable([*text, *ends] for text in encoded))
    if len(tokens) < block_length:
        raise ValueError(
            f"{name}: {len(tokens)} tokens do not fill a block of block_length={block_length}: lower it, or give more "
            "texts."
        )
    return [tokens[i : i + block_length] for i in range(0, len(tokens) - block_length + 1, block_length)]

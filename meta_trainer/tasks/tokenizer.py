"""The tokenizer of a run: a pretrained one, or one trained on its texts."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from meta_trainer.tasks.model import ModelArguments

POSITIONS = 512  # position embeddings of an encoder built from scratch
# Byte-level tokenizers take a word without a space before it for the middle of one.
NEEDS_PREFIX_SPACE = ("bloom", "deberta", "gpt2", "longformer", "roberta")
SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def load_tokenizer(
    name: str, model: ModelArguments, words: bool = False, needs_padding: bool = True
) -> PreTrainedTokenizerBase:
    """Load a pretrained tokenizer.

    Args:
        name: Hub name or local folder.
        model: Whether code of a Hub repository may run.
        words: Whether it is going to be given single words instead of texts.
        needs_padding: Whether batches are padded.

    Raises:
        ValueError: If it cannot be loaded, or lacks a padding token that is needed.
    """
    trust = model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        prefix = {"add_prefix_space": True} if words and config.model_type in NEEDS_PREFIX_SPACE else {}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **prefix)
    # What the library raises for a wrong name or folder, and without a connection.
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer can be loaded from {name!r}, local folder or Hub: {error}") from error
    if needs_padding and tokenizer.pad_token is None:
        raise ValueError(f"The tokenizer of {name!r} has no padding token; give a tokenizer_name that has one.")
    return tokenizer


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on texts; no character is unknown to it.

    WordPiece would not do: its trainer numbers the pieces in the order of a hash table, another in each
    process, so that a resumed run would read other ids.

    Raises:
        ValueError: If ``vocab_size`` has no room for the 256 bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = list(SPECIAL_TOKENS.values())
    if vocab_size < len(alphabet) + len(specials):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(alphabet)} bytes and {len(specials)} special tokens must fit."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **SPECIAL_TOKENS)


def check_room(max_length: int) -> None:
    """Raise ValueError for so few sub-tokens that no word fits."""
    if max_length < 3:
        raise ValueError(f"max_length must leave room for a word between two special tokens, got {max_length}.")


def check_max_length(max_length: int, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Return the most sub-tokens that tokenizer and model can take.

    Raises:
        ValueError: If that is less than ``max_length``.
    """
    positions: Any = getattr(config, "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if max_length > limit:
        raise ValueError(f"max_length={max_length} is more than the {limit} sub-tokens that the model can take.")
    return limit

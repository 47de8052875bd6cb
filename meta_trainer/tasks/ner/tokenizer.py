"""The tokenizer of a run: a pretrained one, or one trained on the sentences."""

import math
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from meta_trainer.tasks.model import ModelArguments
from meta_trainer.tasks.ner.sentences import Sentences

POSITIONS = 512  # position embeddings of an encoder built from scratch
# Byte-level tokenizers take a word without a space before it for the middle of one.
NEEDS_PREFIX_SPACE = ("bloom", "deberta", "gpt2", "longformer", "roberta")
SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def make_tokenizer(model: ModelArguments, training_sets: Sequence[Sentences]) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the settings name, or train one on the training sentences.

    Raises:
        ValueError: If it cannot be loaded, or has no padding token.
    """
    name = model.tokenizer_name or model.model_name_or_path
    if name is None:
        return train_tokenizer(training_sets, model.vocab_size)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)
        prefix = {"add_prefix_space": True} if config.model_type in NEEDS_PREFIX_SPACE else {}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code, **prefix)
    # What the library raises for a wrong name or folder, and without a connection.
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer can be loaded from {name!r}, local folder or Hub: {error}") from error
    if tokenizer.pad_token is None:
        raise ValueError(f"The tokenizer of {name!r} has no padding token; give a tokenizer_name that has one.")
    return tokenizer


def train_tokenizer(training_sets: Sequence[Sentences], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the words of the sentences; no character is unknown to it.

    A set n times smaller than the largest is repeated sqrt(n) times, so that words of the target language get
    pieces of their own: the sampling with exponent 0.5 of XLM (Lample and Conneau,
    `<https://arxiv.org/abs/1901.07291>`_, 2019).

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
    largest = max(map(len, training_sets))
    texts = (
        " ".join(words)
        for sentences in training_sets
        for _ in range(round(math.sqrt(largest / len(sentences))))
        for words in sentences.tokens
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **SPECIAL_TOKENS)

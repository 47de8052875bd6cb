"""Settings of the base model that are the same for every task."""

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    """A pretrained model by name, or the sizes of a small BERT encoder that is trained from scratch."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name or local folder of a pretrained model; none: a small BERT encoder is built."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the tokenizer; none: the model's, or one trained on the data."},
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of an encoder built from scratch."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of an encoder built from scratch."})
    num_attention_heads: int = field(default=2, metadata={"help": "Heads of an encoder built from scratch."})
    intermediate_size: int = field(
        default=256, metadata={"help": "Width of the feed-forward layers of an encoder built from scratch."}
    )
    vocab_size: int = field(
        default=2000, metadata={"help": "Most word pieces that a tokenizer trained on the data may have."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a Hub model, tokenizer or metric."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention kernel: eager, sdpa, flash_attention_2; none: the library's choice."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no encoder can have."""
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}: each head gets an equal part."
            )

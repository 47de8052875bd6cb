"""Settings of text classification with noisy labels, checked before anything is loaded."""

from dataclasses import dataclass, field

from meta_trainer.tasks.class_labels import ClassLabelArguments
from meta_trainer.tasks.tokenizer import check_room

GENERATED = "generated"


@dataclass
class TextClassificationArguments(ClassLabelArguments):
    """Where texts and labels come from, which of them are trusted, and how labels are corrupted.

    The data are either a data set (``data``) or single files (``train_file`` ...), never both.
    """

    rows = "texts"

    data: str | None = field(
        default=None,
        metadata={"help": "Hub data set, local folder, or 'generated' for the embedded corpus."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Instead of data: a parquet, json, jsonl or csv file to train on."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    domain_column: str | None = field(
        default=None,
        metadata={"help": "Column of the training rows that names the source of each, for meta_module=domain_weights."},
    )
    max_length: int = field(default=128, metadata={"help": "Sub-tokens kept of a text."})

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        super().__post_init__()
        check_room(self.max_length)

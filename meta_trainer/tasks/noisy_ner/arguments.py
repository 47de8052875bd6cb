"""Settings of named entity recognition with noisy tags, checked before anything is loaded."""

from dataclasses import dataclass, field
from typing import Literal

from meta_trainer.tasks.labelled_data import LabelledDataArguments
from meta_trainer.tasks.ner.files import FILE_SUFFIXES
from meta_trainer.tasks.ner.tags import parse_tag_map
from meta_trainer.tasks.noisy_ner.noise import ENTITY_NOISE_KINDS
from meta_trainer.tasks.tokenizer import check_room


@dataclass
class NoisyNerArguments(LabelledDataArguments):
    """Where sentences and tags come from, which of them are trusted, and how tags are corrupted."""

    rows = "sentences"
    file_suffixes = FILE_SUFFIXES
    noise_kinds = ENTITY_NOISE_KINDS
    noisy_labels = "train_tags_column"

    data: str | None = field(
        default=None,
        metadata={"help": "Hub data set, local folder, or 'generated' for the embedded corpus."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Instead of data: a parquet, json, jsonl or CoNLL file to train on."}
    )

    tokens_column: str = field(default="tokens", metadata={"help": "Column with the words of a sentence."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column with the trusted IOB2 tag of each word."})
    train_tags_column: str | None = field(
        default=None, metadata={"help": "Column of noisy tags to train on; all other sets keep tags_column."}
    )
    map_tags: list[str] = field(
        default_factory=list,
        metadata={"help": "Entity types to rename or drop: PERSON=PER, DATE=O; none: keep them all."},
    )
    label_noise: Literal["none", "uniform", "flip", "drop"] = field(
        default="none",
        metadata={
            "help": "Corrupt entities to train on: by any other type (uniform), by one for each type (flip), or by "
            "tagging them as no entity (drop)."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Sub-tokens kept of a sentence."})

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        super().__post_init__()
        check_room(self.max_length)
        parse_tag_map(self.map_tags)

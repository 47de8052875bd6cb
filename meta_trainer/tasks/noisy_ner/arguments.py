"""Settings of named entity recognition with noisy tags, checked before anything is loaded."""

from dataclasses import dataclass, field
from typing import Literal

from meta_trainer.tasks.ner.files import FILE_SUFFIXES
from meta_trainer.tasks.ner.tags import parse_tag_map
from meta_trainer.tasks.noisy_data import NoisyDataArguments, check_noise, check_one_noise
from meta_trainer.tasks.noisy_ner.noise import ENTITY_NOISE_KINDS


@dataclass
class NoisyNerArguments(NoisyDataArguments):
    """Where sentences and tags come from, which of them are trusted, and how tags are corrupted."""

    file_suffixes = FILE_SUFFIXES
    examples = "sentences"

    tokens_column: str = field(default="tokens", metadata={"help": "Column with the words of a sentence."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column with the trusted IOB2 tag of each word."})
    train_tags_column: str | None = field(
        default=None, metadata={"help": "Column of noisy tags to train on; all other sets keep tags_column."}
    )
    map_tags: list[str] = field(
        default_factory=list, metadata={"help": "Entity types to rename or drop: PERSON=PER, DATE=O."}
    )
    label_noise: Literal["none", "uniform", "flip", "drop"] = field(
        default="none",
        metadata={
            "help": "Corrupt entities to train on: by any other type (uniform), by one for each type (flip), or by "
            "tagging them as no entity (drop)."
        },
    )

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        super().__post_init__()
        parse_tag_map(self.map_tags)
        check_noise(self.label_noise, self.label_noise_share, ENTITY_NOISE_KINDS)
        check_one_noise(self.label_noise, "train_tags_column", self.train_tags_column)

"""Settings of text classification with noisy labels, checked before anything is loaded."""

from dataclasses import dataclass, field
from typing import Literal

from meta_trainer.tasks.noisy_data import NoisyDataArguments, check_noise, check_one_noise
from meta_trainer.tasks.tables import TABLE_SUFFIXES
from meta_trainer.tasks.text_classification.noise import NOISE_KINDS

GENERATED = "generated"


@dataclass
class TextClassificationArguments(NoisyDataArguments):
    """Where texts and labels come from, which of them are trusted, and how labels are corrupted."""

    file_suffixes = TABLE_SUFFIXES
    examples = "texts"

    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(
        default="label", metadata={"help": "Column of the trusted labels: text or integers, named or not."}
    )
    train_label_column: str | None = field(
        default=None,
        metadata={"help": "Column of noisy labels to train on; all other sets keep label_column."},
    )
    label_noise: Literal["none", "uniform", "flip"] = field(
        default="none",
        metadata={"help": "Corrupt labels to train on: by any other class (uniform), or by one for each class (flip)."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        super().__post_init__()
        check_noise(self.label_noise, self.label_noise_share, NOISE_KINDS)
        check_one_noise(self.label_noise, "train_label_column", self.train_label_column)

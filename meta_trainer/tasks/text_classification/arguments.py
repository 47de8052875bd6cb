"""Settings of text classification with noisy labels, checked before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meta_trainer.tasks.locations import check_data, check_file, data_name, locate
from meta_trainer.tasks.tables import TABLE_SUFFIXES
from meta_trainer.tasks.text_classification.noise import NOISE_KINDS

GENERATED = "generated"
FILE_FIELDS = ("train_file", "validation_file", "test_file")


@dataclass
class TextClassificationArguments:
    """Where texts and labels come from, which of them are trusted, and how labels are corrupted.

    The data are either a data set (``data``) or single files (``train_file`` ...), never both.
    """

    data: str | None = field(
        default=None,
        metadata={"help": "Hub data set, local folder, or 'generated' for the embedded corpus."},
    )
    subset: str | None = field(default=None, metadata={"help": "Subset of data."})
    train_split: str = field(default="train", metadata={"help": "Split of data to train on."})
    validation_split: str | None = field(
        default="validation", metadata={"help": "Split of data scored during training; none: no such set."}
    )
    test_split: str | None = field(
        default="test", metadata={"help": "Split of data scored at the end; none: no such set."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Instead of data: a parquet, json, jsonl or csv file to train on."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "File of rows scored during training."})
    test_file: str | None = field(default=None, metadata={"help": "File of rows scored at the end."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that relative paths start from; none: $META_TRAINER_DATA, else the current one."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(
        default="label", metadata={"help": "Column of the trusted labels: text or integers, named or not."}
    )
    train_label_column: str | None = field(
        default=None,
        metadata={"help": "Column of noisy labels to train on; all other sets keep label_column."},
    )
    exclude_column: str | None = field(
        default=None, metadata={"help": "Boolean column; training rows where it is true are left out."}
    )
    domain_column: str | None = field(
        default=None,
        metadata={"help": "Column of the training rows that names the source of each, for meta_module=domain_weights."},
    )
    num_meta_examples: int = field(
        default=200,
        metadata={
            "help": "Rows with trusted labels, the same number of each class, drawn from the training rows and set "
            "apart from them, with a meta module or without."
        },
    )
    max_train_examples: int | None = field(
        default=None, metadata={"help": "Rows to train on, drawn at random from the others; none: all."}
    )
    subset_seed: int = field(
        default=0,
        metadata={"help": "Seed of both draws; with one seed, a smaller draw is part of a larger one."},
    )
    train_on_meta: bool = field(
        default=False,
        metadata={"help": "Train on the meta set as well, its labels as they are: a baseline without a meta module."},
    )
    label_noise: Literal["none", "uniform", "flip"] = field(
        default="none",
        metadata={"help": "Corrupt labels to train on: by any other class (uniform), or by one for each class (flip)."},
    )
    label_noise_share: float = field(
        default=0.0, metadata={"help": "Share of the training rows that get a wrong label."}
    )
    noise_seed: int | None = field(default=None, metadata={"help": "Seed of the corruption; none: that of the run."})
    max_length: int = field(default=128, metadata={"help": "Sub-tokens kept of a text."})

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        self._check_sources()
        self._check_values()
        self._check_noise()
        check_data("data", self.data, self.data_dir)
        for name in FILE_FIELDS:
            check_file(name, getattr(self, name), self.data_dir, TABLE_SUFFIXES)

    @property
    def dataset_name(self) -> str:
        """The data, as a model card names them."""
        return data_name(self.data, self.subset, self.train_file)

    def path(self, name: str) -> Path:
        """Return where the file or folder ``name`` is looked up."""
        return locate(name, self.data_dir)

    def _check_sources(self) -> None:
        files = [name for name in FILE_FIELDS if getattr(self, name)]
        if self.data and files:
            raise ValueError(f"data={self.data!r} and {', '.join(files)} exclude each other: give one of them.")
        if not self.data and not self.train_file:
            raise ValueError("No texts to train on: give data or train_file.")

    def _check_values(self) -> None:
        if self.max_train_examples is not None and self.max_train_examples < 1:
            raise ValueError(f"max_train_examples must be at least 1, got {self.max_train_examples}.")
        for name in ("num_meta_examples", "subset_seed", "noise_seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        if self.max_length < 3:
            raise ValueError(
                f"max_length must leave room for a word between two special tokens, got {self.max_length}."
            )

    def _check_noise(self) -> None:
        if self.label_noise not in NOISE_KINDS:
            raise ValueError(f"label_noise must be one of {', '.join(NOISE_KINDS)}, got {self.label_noise!r}.")
        if not 0 <= self.label_noise_share < 1:
            raise ValueError(f"label_noise_share must be at least 0 and less than 1, got {self.label_noise_share}.")
        if self.label_noise == "none" and self.label_noise_share:
            raise ValueError(
                f"label_noise_share={self.label_noise_share} needs a kind of noise: set label_noise to "
                f"{' or '.join(NOISE_KINDS[1:])}."
            )
        if self.label_noise != "none" and self.train_label_column:
            raise ValueError(
                f"train_label_column={self.train_label_column!r} holds noisy labels already: leave out "
                f"label_noise={self.label_noise!r}, or the column."
            )

"""Settings of a task whose labels may be wrong: one source of data, and a small meta set of trusted labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from meta_trainer.tasks.locations import check_data, check_file, data_name, locate

FILE_FIELDS = ("train_file", "validation_file", "test_file")


@dataclass
class NoisyDataArguments:
    """Where rows come from, which of them are trusted, and which are trained on.

    The data are either a data set (``data``) or single files (``train_file`` ...), never both.

    Attributes:
        file_suffixes: Kinds of files that the task reads.
        examples: What the task calls its rows.
    """

    file_suffixes: ClassVar[tuple[str, ...]]
    examples: ClassVar[str]

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
    exclude_column: str | None = field(
        default=None, metadata={"help": "Boolean column; training rows where it is true are left out."}
    )
    num_meta_examples: int = field(
        default=200,
        metadata={
            "help": "Rows with trusted labels, the same number of each class, drawn from the training rows and set "
            "apart from them, with a meta module or without."
        },
    )
    meta_file: str | None = field(
        default=None,
        metadata={
            "help": "File of rows with trusted labels, which are the meta set, all of them; none: num_meta_examples."
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
    label_noise_share: float = field(
        default=0.0, metadata={"help": "Share of what is trained on (texts, entities) that gets a wrong label."}
    )
    noise_seed: int | None = field(default=None, metadata={"help": "Seed of the corruption; none: that of the run."})
    max_length: int = field(default=128, metadata={"help": "Sub-tokens kept of a text."})

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        self._check_sources()
        self._check_values()
        check_data("data", self.data, self.data_dir)
        for name in (*FILE_FIELDS, "meta_file"):
            check_file(name, getattr(self, name), self.data_dir, self.file_suffixes)

    @property
    def dataset_name(self) -> str:
        """The data, as a model card names them."""
        return data_name(self.data, self.subset, self.train_file)

    @property
    def has_meta_set(self) -> bool:
        """Whether there are rows of trusted labels to learn from."""
        return bool(self.meta_file or self.num_meta_examples)

    def path(self, name: str) -> Path:
        """Return where the file or folder ``name`` is looked up."""
        return locate(name, self.data_dir)

    def source(self, kind: str) -> str | None:
        """Return the file or split of the ``train``, ``validation`` or ``test`` set, or None for no such set."""
        source: str | None = getattr(self, f"{kind}_split" if self.data else f"{kind}_file")
        return source

    def _check_sources(self) -> None:
        files = [name for name in FILE_FIELDS if getattr(self, name)]
        if self.data and files:
            raise ValueError(f"data={self.data!r} and {', '.join(files)} exclude each other: give one of them.")
        if not self.data and not self.train_file:
            raise ValueError(f"No {self.examples} to train on: give data or train_file.")

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


def check_noise(kind: str, share: float, kinds: Sequence[str]) -> None:
    """Raise ValueError for synthetic noise of no known kind, or of an impossible share; the first kind is none."""
    if kind not in kinds:
        raise ValueError(f"label_noise must be one of {', '.join(kinds)}, got {kind!r}.")
    if not 0 <= share < 1:
        raise ValueError(f"label_noise_share must be at least 0 and less than 1, got {share}.")
    if kind == kinds[0] and share:
        raise ValueError(
            f"label_noise_share={share} needs a kind of noise: set label_noise to {' or '.join(kinds[1:])}."
        )


def check_one_noise(kind: str, setting: str, column: str | None) -> None:
    """Raise ValueError for synthetic noise on labels that are noisy by themselves."""
    if kind != "none" and column:
        raise ValueError(
            f"{setting}={column!r} holds noisy labels already: leave out label_noise={kind!r}, or the column."
        )

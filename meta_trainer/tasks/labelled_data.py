"""Settings of a set of labelled rows: where it comes from, which labels are trusted, and how others are corrupted."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from meta_trainer.tasks.label_noise import NOISE_KINDS
from meta_trainer.tasks.locations import check_data, check_file, data_name, locate
from meta_trainer.tasks.tables import TABLE_SUFFIXES
from meta_trainer.tasks.trusted_rows import TrustedRowsArguments

FILE_FIELDS = ("train_file", "validation_file", "test_file")


@dataclass
class LabelledDataArguments(TrustedRowsArguments):
    """Where labelled rows come from, which of them are trusted, and how labels are corrupted.

    The data are either a data set (``data``) or single files (``train_file`` ...), never both. A subclass has the field
    ``train_file``, one file or a list of them, and ``label_noise``, one of its kinds of noise.

    Attributes:
        rows: What the task calls its rows.
        file_suffixes: Kinds of files that it reads.
        noise_kinds: What ``label_noise`` may be; the first kind is none.
        noisy_labels: Field that names the column of labels that are noisy by themselves.
    """

    rows: ClassVar[str] = "rows"
    file_suffixes: ClassVar[tuple[str, ...]] = TABLE_SUFFIXES
    noise_kinds: ClassVar[tuple[str, ...]] = NOISE_KINDS
    noisy_labels: ClassVar[str] = "train_label_column"

    data: str | None = field(default=None, metadata={"help": "Hub data set or local folder."})
    subset: str | None = field(default=None, metadata={"help": "Subset of data."})
    train_split: str = field(default="train", metadata={"help": "Split of data to train on."})
    validation_split: str | None = field(
        default="validation", metadata={"help": "Split of data scored during training; none: no such set."}
    )
    test_split: str | None = field(
        default="test", metadata={"help": "Split of data scored at the end; none: no such set."}
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
            "help": "Rows with trusted labels, drawn from the training rows and set apart from them, with a meta "
            "module or without."
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
    label_noise_share: float = field(
        default=0.0, metadata={"help": "Share of what is trained on (rows, entities) that gets a wrong label."}
    )
    noise_seed: int | None = field(default=None, metadata={"help": "Seed of the corruption; none: that of the run."})

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        self._check_sources()
        self._check_values()
        self._check_noise()
        check_data("data", self.data, self.data_dir)
        for name in (*FILE_FIELDS, "meta_file"):
            for file in self.files(name):
                check_file(name, file, self.data_dir, self.file_suffixes)

    @property
    def dataset_name(self) -> str:
        """The data, as a model card names them."""
        return data_name(self.data, self.subset, next(iter(self.files("train_file")), None))

    def check_meta_set(self, owner: str = "A meta module") -> None:
        """Raise ValueError unless there are rows of trusted labels for `owner` to learn from."""
        if not (self.meta_file or self.num_meta_examples):
            raise ValueError(f"{owner} needs a meta set: num_meta_examples must be at least 1, got 0.")

    def trusted_columns(self, column: str) -> tuple[str, ...]:
        """Columns of which the first that is filled holds what is known of the training set.

        Args:
            column: Column of its trusted labels. Where the rows of a file are trusted, and rows to train on have noisy
                labels of their own, it may be missing or empty.
        """
        _, noisy = self._noise
        return (column, noisy) if self.meta_file and noisy else (column,)

    def path(self, name: str) -> Path:
        """Return where the file or folder ``name`` is looked up."""
        return locate(name, self.data_dir)

    def files(self, name: str) -> list[str]:
        """Return the files that a field names, such as one of :data:`FILE_FIELDS`."""
        value: str | list[str] | None = getattr(self, name)
        return value if isinstance(value, list) else [value] if value else []

    def sources(self, kind: str) -> list[str]:
        """Return the files, or the split in a list of one, of the set ``kind``; an empty list for no such set."""
        if not self.data:
            return self.files(f"{kind}_file")
        split: str | None = getattr(self, f"{kind}_split")
        return [split] if split else []

    def _check_sources(self) -> None:
        files = [name for name in FILE_FIELDS if self.files(name)]
        if self.data and files:
            raise ValueError(f"data={self.data!r} and {', '.join(files)} exclude each other: give one of them.")
        if not self.data and "train_file" not in files:
            raise ValueError(f"No {self.rows} to train on: give data or train_file.")

    def _check_values(self) -> None:
        if self.max_train_examples is not None and self.max_train_examples < 1:
            raise ValueError(f"max_train_examples must be at least 1, got {self.max_train_examples}.")
        for name in ("num_meta_examples", "subset_seed", "noise_seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        self._check_trusted_rows()
        if self.train_on_meta_alone:
            self.check_meta_set("train_on_meta_alone")

    def _check_noise(self) -> None:
        kind, column = self._noise
        if kind not in self.noise_kinds:
            raise ValueError(f"label_noise must be one of {', '.join(self.noise_kinds)}, got {kind!r}.")
        if not 0 <= self.label_noise_share < 1:
            raise ValueError(f"label_noise_share must be at least 0 and less than 1, got {self.label_noise_share}.")
        if kind == self.noise_kinds[0] and self.label_noise_share:
            raise ValueError(
                f"label_noise_share={self.label_noise_share} needs a kind of noise: set label_noise to "
                f"{' or '.join(self.noise_kinds[1:])}, or label_noise_share to 0."
            )
        if kind != self.noise_kinds[0] and column:
            raise ValueError(
                f"{self.noisy_labels}={column!r} holds noisy labels already: leave out label_noise={kind!r}, or the "
                "column."
            )

    @property
    def _noise(self) -> tuple[str, str | None]:
        """Kind of the synthetic noise, and the column of labels that are noisy by themselves."""
        fields: dict[str, Any] = vars(self)
        return fields["label_noise"], fields[self.noisy_labels]

"""Settings of cross-lingual named entity recognition, checked before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meta_trainer.tasks.locations import check_data, check_file, data_name, locate
from meta_trainer.tasks.ner.files import FILE_SUFFIXES
from meta_trainer.tasks.ner.tags import parse_tag_map
from meta_trainer.tasks.tokenizer import check_room

GENERATED = "generated"
FILE_FIELDS = ("source_train_file", "target_train_file", "target_validation_file", "target_test_file")


@dataclass
class NerArguments:
    """Where source and target sentences come from and how training batches are made of them.

    Each side is either a data set (``source_data``, ``target_data``) or single files (``source_train_file``,
    ``target_train_file`` ...), never both.
    """

    source_data: str | None = field(
        default=None,
        metadata={"help": "Source language: Hub data set, local folder, or 'generated' for the embedded corpus."},
    )
    target_data: str | None = field(
        default=None,
        metadata={"help": "Target language: Hub data set, local folder, or 'generated' for the embedded corpus."},
    )
    source_subset: str | None = field(
        default=None,
        metadata={"help": "Subset of source_data, such as 'en'; generated: a locale, default en_US."},
    )
    target_subset: str | None = field(
        default=None,
        metadata={"help": "Subset of target_data, such as 'qu'; generated: a locale, default fi_FI."},
    )
    source_train_split: str = field(default="train", metadata={"help": "Split of source_data to train on."})
    target_train_split: str = field(
        default="train",
        metadata={"help": "Split of target_data that the few target sentences are drawn from."},
    )
    target_validation_split: str | None = field(
        default="validation",
        metadata={"help": "Split of target_data scored during training; none: no such set."},
    )
    target_test_split: str | None = field(
        default="test", metadata={"help": "Split of target_data scored at the end; none: no such set."}
    )
    source_train_file: str | None = field(
        default=None, metadata={"help": "Instead of source_data: a parquet, json, jsonl or CoNLL file."}
    )
    target_train_file: str | None = field(
        default=None,
        metadata={"help": "Instead of target_data: file that the target sentences are drawn from."},
    )
    target_validation_file: str | None = field(
        default=None, metadata={"help": "File of target sentences scored during training."}
    )
    target_test_file: str | None = field(default=None, metadata={"help": "File of target sentences scored at the end."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that relative paths start from; none: $META_TRAINER_DATA, else the current one."},
    )
    tokens_column: str = field(default="tokens", metadata={"help": "Column with the words of a sentence."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column with the IOB2 tag of each word."})
    map_tags: list[str] = field(
        default_factory=list,
        metadata={"help": "Entity types to rename or drop in both languages: PERSON=PER, DATE=O; none: keep them all."},
    )
    exclude_column: str | None = field(
        default=None, metadata={"help": "Boolean column; training sentences where it is true are left out."}
    )
    max_source_examples: int | None = field(
        default=5000, metadata={"help": "Source sentences to train on, drawn at random; none: all."}
    )
    max_target_examples: int | None = field(
        default=100, metadata={"help": "Target sentences to train on, drawn at random; none: all."}
    )
    subset_seed: int = field(
        default=0,
        metadata={"help": "Seed of both draws; with one seed, a smaller draw is part of a larger one."},
    )
    max_length: int = field(
        default=128, metadata={"help": "Sub-tokens kept of a training sentence; evaluation keeps up to 512."}
    )
    target_batch_size: int = field(
        default=6, metadata={"help": "Target sentences trained on in each step, beside the source batch."}
    )
    meta_split: Literal["per_batch", "fixed"] = field(
        default="per_batch",
        metadata={"help": "Meta sentences are drawn anew beside each batch, or set apart once (fixed)."},
    )
    meta_fraction: float = field(
        default=0.5,
        metadata={"help": "Share of the target sentences set apart by meta_split=fixed (0.5 is 50%%)."},
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Further metrics of the evaluate library: names or local scripts; they need trust_remote_code."
        },
    )

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        self._check_sides()
        self._check_values()
        parse_tag_map(self.map_tags)
        for name in ("source_data", "target_data"):
            check_data(name, getattr(self, name), self.data_dir)
        for name in FILE_FIELDS:
            check_file(name, getattr(self, name), self.data_dir, FILE_SUFFIXES)

    @property
    def dataset_name(self) -> str:
        """The data of both languages, as a model card names them."""
        source = data_name(self.source_data, self.source_subset, self.source_train_file)
        return f"{source} and {data_name(self.target_data, self.target_subset, self.target_train_file)}"

    def path(self, name: str) -> Path:
        """Return where the file or folder ``name`` is looked up."""
        return locate(name, self.data_dir)

    def _check_sides(self) -> None:
        for side in ("source", "target"):
            data, train = getattr(self, f"{side}_data"), getattr(self, f"{side}_train_file")
            files = [name for name in FILE_FIELDS if name.startswith(side) and getattr(self, name)]
            if data and files:
                raise ValueError(f"{side}_data={data!r} and {', '.join(files)} exclude each other: give one of them.")
            if not data and not train:
                raise ValueError(f"No {side} sentences to train on: give {side}_data or {side}_train_file.")

    def _check_values(self) -> None:
        for name in ("max_source_examples", "max_target_examples", "target_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        check_room(self.max_length)
        if self.subset_seed < 0:
            raise ValueError(f"subset_seed must not be negative, got {self.subset_seed}.")
        if self.meta_split not in ("per_batch", "fixed"):
            raise ValueError(f"meta_split must be 'per_batch' or 'fixed', got {self.meta_split!r}.")
        if not 0 < self.meta_fraction < 1:
            raise ValueError(f"meta_fraction must lie between 0 and 1, got {self.meta_fraction}.")

"""Where texts are: files, data sets with their subset and split, and the embedded corpus."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from reprlib import repr as short

from datasets import Dataset

from meta_trainer.tasks.label_columns import read_names
from meta_trainer.tasks.locations import check_data, check_file, locate
from meta_trainer.tasks.tables import TABLE_SUFFIXES, check_columns, load_split, read_table
from meta_trainer.tasks.text_classification.corpus import SIZES, TOPICS, generate_corpus

GENERATED = "generated"
TEXT_SUFFIX = ".txt"
SUFFIXES = (*TABLE_SUFFIXES, TEXT_SUFFIX)


@dataclass(frozen=True)
class Location:
    """A file, or a split of a data set.

    Attributes:
        data: Path of a file or folder, name of a Hub data set, or ``generated``.
        subset: Of a data set, or a topic of the embedded corpus.
        split: Of a data set.
    """

    data: str
    subset: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, value: str) -> Location:
        """Read ``FILE`` or ``DATA[:SUBSET][@SPLIT]``.

        Raises:
            ValueError: If it is written otherwise.
        """
        if value.endswith(SUFFIXES):
            return cls(value)
        match = re.fullmatch(r"([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?", value)
        if match is None:
            raise ValueError(f"Texts are a file, or DATA[:SUBSET][@SPLIT], got {value!r}.")
        data, subset, split = match.groups()
        return cls(data, subset, split or "train")

    @property
    def is_file(self) -> bool:
        """Whether it names a file."""
        return self.data.endswith(SUFFIXES)

    @property
    def name(self) -> str:
        """The data, as a model card names them."""
        if self.is_file:
            return Path(self.data).stem
        return f"{self.data} ({self.subset})" if self.subset else self.data

    def check(self, setting: str, data_dir: str | None) -> None:
        """Raise ValueError if there is no such file or folder, or topic of the embedded corpus."""
        if self.data == GENERATED:
            self._check_generated(setting)
        # A file of another kind is no name to ask the Hub for.
        elif self.is_file or isfile(locate(self.data, data_dir)):
            check_file(setting, self.data, data_dir, SUFFIXES)
        else:
            check_data(setting, self.data, data_dir)

    def read(self, data_dir: str | None, text_column: str, domain_column: str | None = None) -> list[tuple[str, str]]:
        """Texts, each with the name of its domain; without a column of names that is empty.

        Raises:
            ValueError: If a column is missing, there is no text, or a row holds no text or has no domain.
        """
        rows, column = self._rows(data_dir), text_column
        if self.data == GENERATED or self.data.endswith(TEXT_SUFFIX):
            column = "text"
        check_columns(rows, str(self), (column, domain_column))
        texts = list(rows[column])
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str | None):
                raise ValueError(f"{self}, row {number}: expected a text in {column!r}, got {short(text)}.")
        # An empty cell of a CSV file is a missing value.
        used = [i for i, text in enumerate(texts) if text and text.strip()]
        if not used:
            raise ValueError(f"{self} holds no text.")
        domains = [""] * len(used) if domain_column is None else read_names(rows, str(self), used, domain_column)
        return [(texts[i], domain) for i, domain in zip(used, domains, strict=True)]

    def _check_generated(self, setting: str) -> None:
        if self.subset not in (None, *TOPICS) or self.split not in SIZES:
            raise ValueError(
                f"{setting}: the generated corpus has the topics {', '.join(TOPICS)} and the splits "
                f"{', '.join(SIZES)}, got {self}."
            )

    def _rows(self, data_dir: str | None) -> Dataset:
        path = locate(self.data, data_dir)
        if self.data == GENERATED:
            rows = generate_corpus(self.split)
            return rows if self.subset is None else rows.filter(lambda row: row["label"] == self.subset)
        if self.data.endswith(TEXT_SUFFIX):
            return Dataset.from_dict({"text": _lines(path)})
        if self.is_file:
            return read_table(path)
        return load_split(str(path) if path.is_dir() else self.data, self.subset, self.split)

    def __str__(self) -> str:
        """As in settings, the split spelled out."""
        return self.data if self.is_file else f"{self.data}{f':{self.subset}' if self.subset else ''}@{self.split}"


def _lines(path: Path) -> list[str]:
    """Lines of a text file; a text may hold the rarer line separators, at which str.splitlines would cut it."""
    try:
        # Of the bytes, because opened as text a file also ends its lines at carriage returns.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} should be UTF-8 text: {error}") from error
    return [line.removesuffix("\r") for line in text.split("\n")]

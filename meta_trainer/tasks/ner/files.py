"""Single files of tagged sentences: parquet, JSON and CoNLL."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset

from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tags import check_iob2

CONLL_SUFFIXES = (".conll", ".txt", ".tsv", ".bio")
FILE_SUFFIXES = (".parquet", ".json", ".jsonl", *CONLL_SUFFIXES)


def read_table(path: Path) -> Dataset:
    """Read a parquet file, a JSON list of rows, or JSON rows one a line.

    Read at once into memory: the sets are small, and no cache folder is written.

    Raises:
        ValueError: If the file cannot be read as what its name says.
    """
    try:
        if path.suffix == ".parquet":
            return Dataset(pyarrow.parquet.read_table(path))
        return Dataset.from_list(_json_rows(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table of sentences: {error}") from error


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    whole = text.lstrip().startswith("[")
    chunks = [(1, text)] if whole else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[dict[str, Any]] = []
    for number, chunk in chunks:
        try:
            value = json.loads(chunk)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number + error.lineno - 1}: not JSON: {error.msg}.") from error
        rows.extend(value if whole else [value])
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, or one object a line, each a sentence.")
    return rows


def read_conll(path: Path) -> Sentences:
    """Read one word a line, the word first and its tag last; an empty line ends a sentence.

    Raises:
        ValueError: If a line has no tag, a tag is not IOB2, or there is no sentence; it names the line.
    """
    sentences = Sentences(str(path), [], [], [])
    for block in _blocks(path):
        tokens, tags = [], []
        for number, line in block:
            columns = line.split("\t") if "\t" in line else line.split()
            if len(columns) < 2:
                raise ValueError(f"{path}, line {number}: expected a word and its tag, got {line!r}.")
            tokens.append(columns[0])
            tags.append(columns[-1].strip())
        sentences.tokens.append(tokens)
        sentences.tags.append(tags)
        if sentences.lines is not None:
            sentences.lines.append(block[0][0])
    if not sentences.tokens:
        raise ValueError(f"{path} holds no sentence.")
    check_iob2(sentences)
    return sentences


def _blocks(path: Path) -> Iterator[list[tuple[int, str]]]:
    """Yield the numbered lines of each sentence."""
    block: list[tuple[int, str]] = []
    # Split at line feeds only: str.splitlines would also break a word at Unicode's rarer line separators.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            block.append((number, line.rstrip("\r")))
        elif block:
            yield block
            block = []
    if block:
        yield block

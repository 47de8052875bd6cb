"""Single files of tagged sentences: parquet, JSON and CoNLL."""

from collections.abc import Iterator
from pathlib import Path

from meta_trainer.tasks.ner.columns import read_columns
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tags import check_iob2
from meta_trainer.tasks.tables import read_table

CONLL_SUFFIXES = (".conll", ".txt", ".tsv", ".bio")
FILE_SUFFIXES = (".parquet", ".json", ".jsonl", *CONLL_SUFFIXES)


def read_file(
    path: Path, tokens_column: str, tags_column: str | tuple[str, ...], exclude_column: str | None = None
) -> Sentences:
    """Read a file of either kind: a table, or CoNLL, which has no further columns.

    The columns are those of :func:`~meta_trainer.tasks.ner.columns.read_columns`.

    Raises:
        ValueError: If it cannot be read, or sentences of a CoNLL file are to be left out by a column.
    """
    if path.suffix not in CONLL_SUFFIXES:
        return read_columns(read_table(path), str(path), tokens_column, tags_column, exclude_column)
    if exclude_column is not None:
        raise ValueError(f"exclude_column={exclude_column!r}: {path} is a CoNLL file, which has no such column.")
    return read_conll(path)


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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} should be UTF-8 text: {error}") from error
    block: list[tuple[int, str]] = []
    # Split at line feeds only: str.splitlines would also break a word at Unicode's rarer line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            block.append((number, line.rstrip("\r")))
        elif block:
            yield block
            block = []
    if block:
        yield block

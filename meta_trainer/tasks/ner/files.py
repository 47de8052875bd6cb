"""Single files of tagged sentences: parquet, JSON and CoNLL."""

from collections.abc import Iterator
from pathlib import Path

from meta_trainer.tasks.ner.columns import read_columns
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tags import check_iob2, is_iob2
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

    Columns are separated by tabs or spaces, not by the other blanks of Unicode, which belong to a word. A line that
    starts with ``#`` and ends in no tag is a comment.

    Raises:
        ValueError: If a line has no tag, a tag is not IOB2, the first column only numbers the words, or there is no
            sentence; it names the line.
    """
    lines: list[list[int]] = []
    sentences = Sentences(str(path), [], [], lines)
    for block in _blocks(path):
        for number, columns in block:
            if len(columns) < 2:
                raise ValueError(f"{path}, line {number}: expected a word and its tag, got {columns[0]!r}.")
        sentences.tokens.append([columns[0] for _, columns in block])
        sentences.tags.append([columns[-1] for _, columns in block])
        lines.append([number for number, _ in block])
    if not sentences.tokens:
        raise ValueError(f"{path} holds no sentence.")
    check_iob2(sentences)
    _check_words(sentences)
    return sentences


def _check_words(sentences: Sentences) -> None:
    counted = all(words == [str(n) for n in range(1, len(words) + 1)] for words in sentences.tokens)
    if counted and max(map(len, sentences.tokens)) > 1:
        raise ValueError(
            f"{sentences.name}: expected words in the first column, got the numbers 1, 2, 3 ... in every sentence: "
            "leave out the column of numbers, so that each line has its word first and its tag last."
        )


def _blocks(path: Path) -> Iterator[list[tuple[int, list[str]]]]:
    """Yield the numbered lines of each sentence, cut into columns, without comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} should be UTF-8 text: {error}") from error
    block: list[tuple[int, list[str]]] = []
    # Split at line feeds only: str.splitlines would also break a word at Unicode's rarer line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            columns = _columns(line)
            if not _is_comment(columns):
                block.append((number, columns))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _is_comment(columns: list[str]) -> bool:
    # Comments of CoNLL-U read "# name = value"; the value may look like a tag.
    return columns[0].startswith("#") and (columns[2:3] == ["="] or not is_iob2(columns[-1]))


def _columns(line: str) -> list[str]:
    # A word such as 10 000 may hold a no-break space, at which str.split would cut it.
    columns = line.split("\t") if "\t" in line else line.strip(" ").split(" ")
    return [*columns[:-1], columns[-1].strip()]

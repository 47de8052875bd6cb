"""Tagged sentences from the columns of a data set."""

from reprlib import repr as short
from typing import Any

from datasets import ClassLabel, Dataset

from meta_trainer.tasks.label_columns import not_excluded
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tags import check_iob2
from meta_trainer.tasks.tables import check_columns, first_filled


def read_columns(
    dataset: Dataset,
    name: str,
    tokens_column: str,
    tags_column: str | tuple[str, ...],
    exclude_column: str | None = None,
) -> Sentences:
    """Read the two columns of a data set; integer tags become the names of the column's classes.

    Args:
        dataset: Rows with a list of words and a list of tags of the same length.
        name: What error messages call the data set.
        tokens_column: Column of the words.
        tags_column: Column of the tags; of several, the first that is filled.
        exclude_column: Boolean column; rows where it is true are left out.

    Raises:
        ValueError: If a column is missing, a row is no sentence or a tag not IOB2; it names the place.
    """
    if not isinstance(tags_column, str):
        tags_column = first_filled(dataset, tags_column)
    check_columns(dataset, name, (tokens_column, tags_column, exclude_column))
    rows = dataset.select_columns([tokens_column, tags_column]).to_dict()
    sentences = Sentences(name, rows[tokens_column], rows[tags_column])
    _check_rows(sentences)
    sentences = _name_classes(sentences, dataset.features[tags_column])
    # Before any row is left out, so that an error counts the sentences as the file does.
    check_iob2(sentences)
    if exclude_column is None:
        return sentences
    return sentences.select(not_excluded(dataset, name, exclude_column))


def _check_rows(sentences: Sentences) -> None:
    for i, (tokens, tags) in enumerate(zip(sentences.tokens, sentences.tags, strict=True)):
        if not isinstance(tokens, list) or not isinstance(tags, list):
            found = f"{short(tokens)}, {short(tags)}"
            raise ValueError(f"{sentences.where(i)}: expected lists of words and of tags, got {found}.")
        if not tokens:
            raise ValueError(f"{sentences.where(i)} has no words; leave it out of the data.")
        if len(tokens) != len(tags):
            raise ValueError(f"{sentences.where(i)}: {len(tokens)} words but {len(tags)} tags; each word needs one.")
        for j, token in enumerate(tokens):
            if not isinstance(token, str):
                raise ValueError(f"{sentences.where(i, j)}: expected a word as text, got {type(token).__name__}.")


def _name_classes(sentences: Sentences, feature: Any) -> Sentences:
    names = feature.feature.names if isinstance(getattr(feature, "feature", None), ClassLabel) else None
    return Sentences(
        sentences.name,
        sentences.tokens,
        [
            [_tag_text(tag, names, sentences, i, j) for j, tag in enumerate(tags)]
            for i, tags in enumerate(sentences.tags)
        ],
    )


def _tag_text(tag: Any, names: list[str] | None, sentences: Sentences, i: int, j: int) -> str:
    if isinstance(tag, str):
        return tag
    if names is None:
        raise ValueError(
            f"{sentences.where(i, j)}: expected a tag as text, got {short(tag)}; "
            "integer tags need a column of ClassLabel type that names them."
        )
    if not isinstance(tag, int) or not 0 <= tag < len(names):
        raise ValueError(
            f"{sentences.where(i, j)}: tag {tag!r} is outside the {len(names)} classes {', '.join(names)}."
        )
    return names[tag]

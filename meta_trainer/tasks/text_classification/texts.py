"""Labelled texts from the columns of a data set."""

from dataclasses import dataclass
from reprlib import repr as short

from datasets import Dataset

from meta_trainer.tasks.label_columns import Labels, read_labels, used_rows


@dataclass(frozen=True)
class Texts:
    """Texts of one file or split.

    Attributes:
        texts: The texts.
        labels: Their labels.
    """

    texts: list[str]
    labels: Labels


def read_texts(
    dataset: Dataset,
    name: str,
    text_column: str,
    label_column: str,
    noisy_label_column: str | None = None,
    exclude_column: str | None = None,
) -> Texts:
    """Read texts and labels.

    Args:
        dataset: Rows with a text and a label.
        name: What error messages call the data set.
        text_column: Column of the texts.
        label_column: Column of the trusted labels.
        noisy_label_column: Column of the labels to train on; None: the trusted ones.
        exclude_column: Boolean column; rows where it is true are left out.

    Raises:
        ValueError: If a column is missing, there is no row, or a row has no text or no label; it names the row.
    """
    rows = used_rows(dataset, name, (text_column, label_column, noisy_label_column), exclude_column)
    texts = list(dataset[text_column])
    for i in rows:
        if not isinstance(texts[i], str):
            raise ValueError(f"{name}, row {i + 1}: expected a text in {text_column!r}, got {short(texts[i])}.")
    return Texts([texts[i] for i in rows], read_labels(dataset, name, rows, label_column, noisy_label_column))

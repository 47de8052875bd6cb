"""Labelled texts from the columns of a data set."""

from dataclasses import dataclass
from reprlib import repr as short

from datasets import Dataset

from meta_trainer.tasks.label_columns import Labels, read_labels, read_names, used_rows


@dataclass(frozen=True)
class Texts:
    """Texts of one file or split.

    Attributes:
        texts: The texts.
        labels: Their labels.
        domains: Name of each text's source; empty without a column of them.
    """

    texts: list[str]
    labels: Labels
    domains: list[str]


def read_texts(
    dataset: Dataset,
    name: str,
    text_column: str,
    label_column: str,
    noisy_label_column: str | None = None,
    exclude_column: str | None = None,
    domain_column: str | None = None,
) -> Texts:
    """Read texts and labels.

    Args:
        dataset: Rows with a text and a label.
        name: What error messages call the data set.
        text_column: Column of the texts.
        label_column: Column of the trusted labels.
        noisy_label_column: Column of the labels to train on; None: the trusted ones.
        exclude_column: Boolean column; rows where it is true are left out.
        domain_column: Column of the sources' names, text or integers, named or not.

    Raises:
        ValueError: If a column is missing, there is no row, or a row has no text or no label; it names the row.
    """
    columns = (text_column, label_column, noisy_label_column, domain_column)
    rows = used_rows(dataset, name, columns, exclude_column)
    texts = list(dataset[text_column])
    for i in rows:
        if not isinstance(texts[i], str):
            raise ValueError(f"{name}, row {i + 1}: expected a text in {text_column!r}, got {short(texts[i])}.")
    labels = read_labels(dataset, name, rows, label_column, noisy_label_column)
    domains = [] if domain_column is None else read_names(dataset, name, rows, domain_column)
    return Texts([texts[i] for i in rows], labels, domains)

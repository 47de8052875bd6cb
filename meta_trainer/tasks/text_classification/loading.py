"""From settings to labelled sets: where each comes from, which rows are trusted, and which labels are wrong."""

from dataclasses import dataclass

from datasets import Dataset

from meta_trainer.tasks.label_columns import class_names
from meta_trainer.tasks.labelled_rows import DrawnRows, draw_rows, label_ids, read_meta_file, read_source
from meta_trainer.tasks.tables import first_filled
from meta_trainer.tasks.text_classification.arguments import GENERATED, TextClassificationArguments
from meta_trainer.tasks.text_classification.corpus import generate_corpus
from meta_trainer.tasks.text_classification.texts import Texts, read_texts


@dataclass(frozen=True)
class TextData:
    """The sets of a run.

    Attributes:
        classes: Names of the classes in the order of their ids.
        train: Rows of ``row`` (number in the file, from 0), ``text``, ``label`` (to train on), where they are known
            ``trusted_label`` and ``is_corrupted``, and ``domain``, the name of the source, where a column names it.
        meta: The same of the meta set, none of whose rows is in ``train``; empty where none is set apart. Rows of a
            file of their own name no source.
        validation: Rows of ``text`` and ``label``, or None.
        test: The same, or None.
    """

    classes: list[str]
    train: Dataset
    meta: Dataset
    validation: Dataset | None
    test: Dataset | None


def load_text_data(arguments: TextClassificationArguments, seed: int) -> TextData:
    """Load all sets, set the meta set apart, draw the training rows and corrupt their labels.

    Args:
        arguments: The settings.
        seed: Seed of the corruption where the settings have none.

    Raises:
        ValueError: If a set cannot be loaded, or is too small for what is to be drawn from it.
    """
    train = _load(arguments, "train")
    others = {kind: _load(arguments, kind) for kind in ("validation", "test") if arguments.sources(kind)}
    checked = _load_meta(arguments)
    further = [] if checked is None else [checked]
    classes = class_names([texts.labels for texts in (train, *others.values(), *further)])
    drawn, meta = draw_rows(train.labels, None if checked is None else checked.labels, classes, arguments, seed)
    scored = {
        kind: Dataset.from_dict({"text": texts.texts, "label": label_ids(texts.labels.labels, classes)})
        for kind, texts in others.items()
    }
    return TextData(
        classes,
        train=_with_texts(train, drawn),
        meta=_with_texts(checked or train, meta),
        validation=scored.get("validation"),
        test=scored.get("test"),
    )


def _with_texts(texts: Texts, drawn: DrawnRows) -> Dataset:
    columns = drawn.record.to_dict()
    own = {"row": columns.pop("row"), "text": [texts.texts[i] for i in drawn.positions]}
    domains = {"domain": [texts.domains[i] for i in drawn.positions]} if texts.domains else {}
    return Dataset.from_dict({**own, **columns, **domains})


def _load(arguments: TextClassificationArguments, kind: str) -> Texts:
    """Load one set; noisy labels and the column of rows to leave out are for the training set only."""
    (source,) = arguments.sources(kind)
    if arguments.data == GENERATED:
        dataset, name = generate_corpus(source), f"{GENERATED}, split {source}"
    else:
        dataset, name = read_source(arguments, source)
    if kind != "train":
        return read_texts(dataset, name, arguments.text_column, arguments.label_column)
    label_column = first_filled(dataset, arguments.trusted_columns(arguments.label_column))
    columns = (arguments.train_label_column, arguments.exclude_column, arguments.domain_column)
    return read_texts(dataset, name, arguments.text_column, label_column, *columns)


def _load_meta(arguments: TextClassificationArguments) -> Texts | None:
    found = read_meta_file(arguments)
    return None if found is None else read_texts(*found, arguments.text_column, arguments.label_column)

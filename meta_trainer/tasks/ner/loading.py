"""From settings to tagged sentences: where each set comes from, and which of its sentences are used."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from meta_trainer.tasks.ner.arguments import GENERATED, NerArguments
from meta_trainer.tasks.ner.columns import read_columns
from meta_trainer.tasks.ner.corpus import SOURCE_LOCALE, TARGET_LOCALE, generate_corpus
from meta_trainer.tasks.ner.files import CONLL_SUFFIXES, read_file
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tags import check_shared_types, entity_types, iob2_tags, map_entity_types, parse_tag_map
from meta_trainer.tasks.tables import load_split

# The names that the Hub's folder layout accepts for a split.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class NerData:
    """The sets of a run and the tags that occur in any of them."""

    tags: list[str]
    source_train: Sentences
    target_train: Sentences
    target_validation: Sentences | None
    target_test: Sentences | None


def load_ner_data(ner: NerArguments) -> NerData:
    """Load and map all sets, and draw the training subsets.

    The tags are those of whole sets, before a subset is drawn: runs of different sizes share them.

    Raises:
        ValueError: If a set cannot be loaded, a tag is not IOB2, ``map_tags`` names an unknown type, or a scored set
            has entities, but none of a type to train on.
    """
    sets = {
        "source_train": _load(ner, "source", "train"),
        "target_train": _load(ner, "target", "train"),
        "target_validation": _load(ner, "target", "validation"),
        "target_test": _load(ner, "target", "test"),
    }
    loaded = {name: sentences for name, sentences in sets.items() if sentences is not None}
    tag_map = parse_tag_map(ner.map_tags)
    known = entity_types(loaded.values())
    if unknown := sorted(set(tag_map) - set(known)):
        raise ValueError(f"map_tags: no entity of type {', '.join(unknown)} in the data; it has {', '.join(known)}.")
    loaded = {name: map_entity_types(sentences, tag_map) for name, sentences in loaded.items()}
    check_shared_types(loaded.values(), [loaded["source_train"], loaded["target_train"]])
    return NerData(
        tags=iob2_tags(entity_types(loaded.values())),
        source_train=draw_subset(loaded["source_train"], ner.max_source_examples, ner.subset_seed),
        target_train=draw_subset(loaded["target_train"], ner.max_target_examples, ner.subset_seed),
        target_validation=loaded.get("target_validation"),
        target_test=loaded.get("target_test"),
    )


def draw_subset(sentences: Sentences, size: int | None, seed: int) -> Sentences:
    """Draw ``size`` sentences without replacement, or put all in random order.

    Nested: with the same seed, the draw of n is the beginning of the draw of any m > n.
    """
    return sentences.select(np.random.default_rng(seed).permutation(len(sentences))[:size])


def _load(ner: NerArguments, side: str, kind: str) -> Sentences | None:
    """Load one set; None where the settings name none."""
    exclude = ner.exclude_column if kind == "train" else None
    data = getattr(ner, f"{side}_data")
    if data is None:
        file = getattr(ner, f"{side}_{kind}_file")
        sentences = None if file is None else read_file(ner.path(file), ner.tokens_column, ner.tags_column, exclude)
    else:
        split = getattr(ner, f"{side}_{kind}_split")
        columns = ("tokens", "ner_tags") if data == GENERATED else (ner.tokens_column, ner.tags_column)
        subset = getattr(ner, f"{side}_subset")
        if data == GENERATED:
            subset = subset or (SOURCE_LOCALE if side == "source" else TARGET_LOCALE)
        where = (data, subset, split, ner.path(data))
        sentences = None if split is None else read_split(*where, *columns, exclude, f"{side}_subset")
    if sentences is not None and not len(sentences):
        raise ValueError(f"{sentences.name} holds no sentence.")
    return sentences


def read_split(
    data: str,
    subset: str | None,
    split: str,
    folder: Path,
    tokens_column: str,
    tags_column: str | tuple[str, ...],
    exclude_column: str | None = None,
    subset_setting: str = "subset",
) -> Sentences:
    """Read a split of the embedded corpus, of a local folder or of a Hub data set.

    Args:
        data: ``generated``, or the name of the data set.
        subset: Subset of the data set; generated: its locale.
        split: Name of the split.
        folder: Where ``data`` is looked up first.
        tokens_column: Column of the words.
        tags_column: Column of the tags; of several, the first that is filled.
        exclude_column: Boolean column; sentences where it is true are left out.
        subset_setting: The setting that names the subset, as an error calls it.

    Raises:
        ValueError: If there is no such subset or split, or what it holds are no tagged sentences.
    """
    name = f"{data}{f' ({subset})' if subset else ''}, split {split}"
    if data == GENERATED:
        return read_columns(generate_corpus(str(subset), split), name, tokens_column, tags_column, exclude_column)
    conll = _conll_file(folder / (subset or ""), split)
    if conll is not None:
        return read_file(conll, tokens_column, tags_column, exclude_column)
    if not folder.is_dir():
        dataset = load_split(data, subset, split)
    else:
        dataset = _load_folder(folder, subset, split, subset_setting)
    return read_columns(dataset, name, tokens_column, tags_column, exclude_column)


def _load_folder(folder: Path, subset: str | None, split: str, subset_setting: str) -> Dataset:
    try:
        return load_split(str(folder), subset, split)
    except ValueError as error:
        # The words of the library for a subset that it does not know.
        if subset is None or "BuilderConfig" not in str(error):
            raise
        raise ValueError(
            f"Folder {folder} has no subset {subset!r}: {error.__cause__}. For a folder without subsets, set "
            f"{subset_setting} to none: `--{subset_setting} none`."
        ) from error


def _conll_file(folder: Path, split: str) -> Path | None:
    """Find the CoNLL file of a split; the datasets library would read it as plain text."""
    for name in SPLIT_NAMES.get(split, (split,)):
        for suffix in CONLL_SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None

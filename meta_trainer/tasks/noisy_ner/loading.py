"""From settings to tagged sentences: which are trusted, which are trained on, and which of their tags are wrong."""

from dataclasses import dataclass, replace

import numpy as np

from meta_trainer.tasks.ner.arguments import GENERATED
from meta_trainer.tasks.ner.corpus import SOURCE_LOCALE
from meta_trainer.tasks.ner.files import read_file
from meta_trainer.tasks.ner.loading import read_split
from meta_trainer.tasks.ner.sentences import Sentences
from meta_trainer.tasks.ner.tags import check_shared_types, entity_types, iob2_tags, map_entity_types, parse_tag_map
from meta_trainer.tasks.noisy_ner.arguments import NoisyNerArguments
from meta_trainer.tasks.noisy_ner.noise import corrupt_entities


@dataclass(frozen=True)
class NoisyNerData:
    """The sets of a run and the tags that occur in any of them.

    Attributes:
        tags: The classes in the order of their ids.
        train: Sentences to train on, their tags as they are to be learned.
        train_trusted: The same sentences, their tags before any noise is put on them. Where only the rows of a file
            are trusted, these may be as wrong, and are the same.
        meta: Sentences with trusted tags, none of which is in ``train``; empty where none is set apart.
        validation: Sentences scored during training, or None.
        test: Sentences scored at the end, or None.
    """

    tags: list[str]
    train: Sentences
    train_trusted: Sentences
    meta: Sentences
    validation: Sentences | None
    test: Sentences | None


def load_noisy_ner_data(arguments: NoisyNerArguments, seed: int) -> NoisyNerData:
    """Load all sets, set the meta set apart, draw the sentences to train on and corrupt their tags.

    Args:
        arguments: The settings.
        seed: Seed of the corruption where the settings have none.

    Raises:
        ValueError: If a set cannot be loaded, is too small for what is to be drawn from it, or has entities, but none
            of a type to train on.
    """
    sets = _load_sets(arguments)
    check_shared_types(sets.values(), [sets.get("noisy", sets["train"])])
    types = entity_types(sets.values())
    trusted, noisy = sets["train"], sets.get("noisy", sets["train"])
    order = np.random.default_rng(arguments.subset_seed).permutation(len(trusted))
    checked = sets.get("meta")
    meta, left = np.split(order, [arguments.num_meta_examples if checked is None else 0])
    if not len(left):
        raise ValueError(
            f"num_meta_examples={arguments.num_meta_examples} leaves none of {len(trusted)} sentences to train on: "
            "lower it."
        )
    rows = left[: arguments.max_train_examples]
    train = noisy.select(rows)
    noise_seed = seed if arguments.noise_seed is None else arguments.noise_seed
    tags = corrupt_entities(train.tags, types, arguments.label_noise, arguments.label_noise_share, noise_seed)
    return NoisyNerData(
        tags=iob2_tags(types),
        train=replace(train, tags=tags),
        train_trusted=trusted.select(rows),
        meta=trusted.select(meta) if checked is None else checked,
        validation=sets.get("validation"),
        test=sets.get("test"),
    )


def _load_sets(arguments: NoisyNerArguments) -> dict[str, Sentences]:
    kinds = [kind for kind in ("train", "validation", "test") if arguments.sources(kind)]
    trusted = {"train": arguments.trusted_columns(arguments.tags_column)}
    sets = {kind: _load(arguments, kind, trusted.get(kind, arguments.tags_column)) for kind in kinds}
    if arguments.train_tags_column:
        if sets["train"].lines is not None:
            raise ValueError(
                f"train_tags_column={arguments.train_tags_column!r}: {sets['train'].name} is a CoNLL file, which has "
                "no such column."
            )
        noisy = _load(arguments, "train", arguments.train_tags_column)
        sets["noisy"] = replace(noisy, name=f"{noisy.name}, column {arguments.train_tags_column!r}")
    if arguments.meta_file:
        sets["meta"] = read_file(arguments.path(arguments.meta_file), arguments.tokens_column, arguments.tags_column)
    if empty := [sentences.name for sentences in sets.values() if not len(sentences)]:
        raise ValueError(f"{empty[0]} holds no sentence.")
    tag_map, known = parse_tag_map(arguments.map_tags), entity_types(sets.values())
    if unknown := sorted(set(tag_map) - set(known)):
        raise ValueError(f"map_tags: no entity of type {', '.join(unknown)} in the data; it has {', '.join(known)}.")
    return {kind: map_entity_types(sentences, tag_map) for kind, sentences in sets.items()}


def _load(arguments: NoisyNerArguments, kind: str, tags_column: str | tuple[str, ...]) -> Sentences:
    """Load one set; sentences are left out of the training set only."""
    (source,) = arguments.sources(kind)
    columns = (arguments.tokens_column, tags_column, arguments.exclude_column if kind == "train" else None)
    if arguments.data is None:
        sentences = read_file(arguments.path(source), *columns)
    else:
        locale = SOURCE_LOCALE if arguments.data == GENERATED else None
        subset = arguments.subset or locale
        sentences = read_split(arguments.data, subset, source, arguments.path(arguments.data), *columns)
    return sentences

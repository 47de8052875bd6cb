"""From settings to texts: which source each comes from, which are trusted, and which are made worse."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from meta_trainer.tasks.language_modeling.arguments import LanguageModelingArguments
from meta_trainer.tasks.language_modeling.corruption import corrupt_texts
from meta_trainer.tasks.language_modeling.locations import Location

Texts = list[str]


@dataclass(frozen=True)
class LanguageData:
    """The texts of a run.

    Attributes:
        train: To train on, by source.
        meta: The trusted ones, none of which is in ``train``; empty where there are none.
        validation: Scored during training, or None.
        test: Scored at the end, or None.
    """

    train: dict[str, Texts]
    meta: Texts
    validation: Texts | None
    test: Texts | None


def load_language_data(arguments: LanguageModelingArguments, seed: int) -> LanguageData:
    """Read all texts, set the trusted ones apart, draw those to train on and corrupt some sources.

    Args:
        arguments: The settings.
        seed: Seed of the corruption where the settings have none.

    Raises:
        ValueError: If texts cannot be read, a source is unknown, or too small for what is drawn from it.
    """
    train, meta = _set_meta_apart(arguments, _shared_out(arguments))
    for number, (name, texts) in enumerate(train.items()):
        texts = texts[: arguments.max_source_examples]
        if kind := arguments.corruptions.get(name):
            own = seed if arguments.corruption_seed is None else arguments.corruption_seed
            texts = corrupt_texts(texts, kind, own + number)
        train[name] = texts
    return LanguageData(
        train, meta, _scored(arguments, arguments.validation_texts), _scored(arguments, arguments.test_texts)
    )


def _shared_out(arguments: LanguageModelingArguments) -> dict[str, Texts]:
    """All texts by source, in a random order; those of a location that several name are dealt out among them."""
    if arguments.domain_column is not None:
        return _by_column(arguments)
    names: dict[Location, list[str]] = defaultdict(list)
    for name, location in arguments.locations.items():
        names[location].append(name)
    found = {}
    for location, sharers in names.items():
        texts = _shuffled(_read(arguments, location), arguments.subset_seed)
        if len(texts) < len(sharers):
            raise ValueError(f"{location} holds {len(texts)} texts, too few for the sources {', '.join(sharers)}.")
        found.update({name: texts[i :: len(sharers)] for i, name in enumerate(sharers)})
    return {name: found[name] for name in arguments.locations}


def _by_column(arguments: LanguageModelingArguments) -> dict[str, Texts]:
    (location,) = arguments.locations.values()
    found: dict[str, Texts] = defaultdict(list)
    for text, name in location.read(arguments.data_dir, arguments.text_column, arguments.domain_column):
        found[name].append(text)
    named = {*arguments.corruptions, *([arguments.trusted_source] if arguments.trusted_source else [])}
    if unknown := sorted(named - found.keys()):
        raise ValueError(
            f"There is no source {unknown[0]!r} in column {arguments.domain_column!r} of {location}; the sources are "
            f"{', '.join(sorted(found))}."
        )
    return {name: _shuffled(found[name], arguments.subset_seed) for name in sorted(found)}


def _set_meta_apart(arguments: LanguageModelingArguments, train: dict[str, Texts]) -> tuple[dict[str, Texts], Texts]:
    if arguments.meta_texts is not None:
        return train, _read(arguments, Location.parse(arguments.meta_texts))
    if arguments.trusted_source is None:
        return train, []
    texts, size = train[arguments.trusted_source], arguments.num_meta_examples
    if size >= len(texts):
        raise ValueError(
            f"num_meta_examples={size} leaves none of the {len(texts)} texts of {arguments.trusted_source!r} to train "
            "on: lower it."
        )
    return {**train, arguments.trusted_source: texts[size:]}, texts[:size]


def _scored(arguments: LanguageModelingArguments, value: str | None) -> Texts | None:
    return None if value is None else _read(arguments, Location.parse(value))[: arguments.max_eval_examples]


def _read(arguments: LanguageModelingArguments, location: Location) -> Texts:
    return [text for text, _ in location.read(arguments.data_dir, arguments.text_column)]


def _shuffled(texts: Texts, seed: int) -> Texts:
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]

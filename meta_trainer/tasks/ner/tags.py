"""IOB2 tags: the check, the renaming of entity types, and the joint inventory of several data sets."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from reprlib import repr as short

from meta_trainer.tasks.ner.sentences import Sentences

OUTSIDE = "O"

logger = logging.getLogger(__name__)


def check_iob2(sentences: Sentences) -> None:
    """Raise ValueError at the first tag that IOB2 does not allow, naming sentence and word.

    A tag is ``O``, ``B-TYPE`` at the first word of an entity, or ``I-TYPE`` at its further words.
    """
    for i, tags in enumerate(sentences.tags):
        previous = OUTSIDE
        for j, tag in enumerate(tags):
            if not is_iob2(tag):
                raise ValueError(
                    f"{sentences.where(i, j)}: expected an IOB2 tag (O, B-TYPE or I-TYPE), got {short(tag)}."
                )
            if tag[:2] == "I-" and previous[2:] != tag[2:]:
                raise ValueError(
                    f"{sentences.where(i, j)}: {tag!r} continues an entity, but the tag before it is "
                    f"{previous!r}; in IOB2 an entity starts with 'B-{tag[2:]}'."
                )
            previous = tag


def is_iob2(tag: str) -> bool:
    """Whether a tag is ``O``, ``B-TYPE`` or ``I-TYPE``."""
    return tag == OUTSIDE or (tag[:2] in ("B-", "I-") and bool(tag[2:].strip()))


def entity_types(sets: Iterable[Sentences]) -> list[str]:
    """Return the entity types that occur in any of the sets, sorted."""
    tags = {tag for sentences in sets for row in sentences.tags for tag in row}
    return sorted({tag[2:] for tag in tags if tag != OUTSIDE})


def check_shared_types(sets: Iterable[Sentences], trained: Sequence[Sentences]) -> None:
    """Warn of entity types that a set has and none of those to train on.

    Args:
        sets: Scored or trusted sentences.
        trained: Sentences to train on.

    Raises:
        ValueError: If all types of a set are such.
    """
    known, names = entity_types(trained), " and ".join(dict.fromkeys(sentences.name for sentences in trained))
    for sentences in sets:
        own = entity_types([sentences])
        unknown = [name for name in own if name not in known]
        if unknown and unknown == own:
            raise ValueError(
                f"No entity type of {sentences.name} ({', '.join(own)}) is one of {names} to train on "
                f"({', '.join(known) or 'none'}): rename types by map_tags, such as PERSON=PER."
            )
        if unknown:
            logger.warning(
                "%s has entities of type %s, of which %s has none; map_tags renames or drops types.",
                sentences.name, ", ".join(unknown), names,
            )  # fmt: skip


def iob2_tags(types: Sequence[str]) -> list[str]:
    """Return ``O``, then ``B-`` and ``I-`` of each type: a model's classes, in the order of their ids."""
    return [OUTSIDE, *(f"{prefix}-{name}" for name in types for prefix in "BI")]


def parse_tag_map(entries: Sequence[str]) -> dict[str, str]:
    """Parse entries such as ``PERSON=PER`` or ``DATE=O`` (dropped).

    Raises:
        ValueError: If an entry is not of that form, or a type is mapped twice.
    """
    tag_map: dict[str, str] = {}
    for entry in entries:
        old, equals, new = entry.partition("=")
        if not (old and equals and new):
            raise ValueError(f"map_tags: expected entries such as PERSON=PER or DATE=O, got {entry!r}.")
        if old in tag_map:
            raise ValueError(f"map_tags maps {old!r} twice: to {tag_map[old]!r} and to {new!r}.")
        tag_map[old] = new
    return tag_map


def map_entity_types(sentences: Sentences, tag_map: Mapping[str, str]) -> Sentences:
    """Rename entity types; a type mapped to ``O`` is no entity any more."""
    new_tags = {OUTSIDE: OUTSIDE}
    for tag in {tag for row in sentences.tags for tag in row} - {OUTSIDE}:
        new_type = tag_map.get(tag[2:], tag[2:])
        new_tags[tag] = OUTSIDE if new_type == OUTSIDE else tag[:2] + new_type
    tags = [[new_tags[tag] for tag in row] for row in sentences.tags]
    return replace(sentences, tags=tags)

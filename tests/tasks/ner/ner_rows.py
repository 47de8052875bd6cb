"""Three tagged sentences; one is marked as a duplicate, one holds a type that the others lack."""

from typing import Any

ROWS: list[dict[str, Any]] = [
    {
        "tokens": ["Ada", "Lovelace", "saw", "Turin"],
        "ner_tags": ["B-PER", "I-PER", "O", "B-LOC"],
        "dup": False,
    },
    {"tokens": ["It", "rained"], "ner_tags": ["O", "O"], "dup": True},
    {
        "tokens": ["IBM", "hired", "Ada", "in", "1950"],
        "ner_tags": ["B-ORG", "O", "B-PER", "O", "B-DATE"],
        "dup": False,
    },
]

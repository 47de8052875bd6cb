"""Tagged sentences with a column of noisy tags; one is marked as a duplicate."""

from typing import Any

ROWS: list[dict[str, Any]] = [
    {
        "tokens": ["Ada", "Lovelace", "saw", "Turin"],
        "ner_tags": ["B-PER", "I-PER", "O", "B-LOC"],
        "noisy_ner_tags": ["B-PER", "O", "O", "B-PER"],
        "dup": False,
    },
    {"tokens": ["It", "rained"], "ner_tags": ["O", "O"], "noisy_ner_tags": ["O", "B-DATE"], "dup": True},
    {
        "tokens": ["Turin", "is", "far"],
        "ner_tags": ["B-LOC", "O", "O"],
        "noisy_ner_tags": ["B-LOC", "O", "O"],
        "dup": False,
    },
    {
        "tokens": ["Ada", "hired", "Ida", "Rhodes"],
        "ner_tags": ["B-PER", "O", "B-PER", "I-PER"],
        "noisy_ner_tags": ["B-PER", "O", "O", "O"],
        "dup": False,
    },
]

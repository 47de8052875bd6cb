"""The embedded corpus: one-line news on four topics, made on the spot."""

import random
import zlib

from datasets import Dataset

TOPICS = {
    "business": "bank merger shares profit factory investor market export loan supplier brand invoice",
    "culture": "novel museum orchestra painter festival theatre poem gallery film sculpture choir library",
    "science": "telescope molecule fossil vaccine satellite physicist enzyme glacier genome laboratory comet robot",
    "sport": "striker marathon referee stadium tournament goalkeeper sprint coach medal league swimmer relay",
}
TEMPLATES = (
    "The {own} was the talk of the town on {day} .",
    "Nobody expected the {own} to change so much in {year} .",
    "A report on the {own} and the {own} is due on {day} .",
    "After the {own} came the {own} , and then nothing .",
    "Readers asked about the {own} , not about the {other} .",
    "What does the {own} have to do with a {own} ?",
    "In {year} the {own} was still new .",
    "The {other} was forgotten when the {own} met the {own} .",
    "More on the {own} on {day} .",
    "Is the {own} better than the {own} of {year} ?",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SIZES = {"train": 1200, "validation": 200, "test": 400}


def generate_corpus(split: str, seed: int = 0, size: int | None = None) -> Dataset:
    """Generate one split of the corpus, the same for the same arguments.

    A sentence has one or two words of its topic and, now and then, one of another topic. No two are the same, of one
    split or of two.

    Args:
        split: ``train``, ``validation`` or ``test``.
        seed: Seed of topics, templates and words.
        size: Sentences; a smaller split is the beginning of a larger one. None: 1200, 200 or 400.

    Returns:
        Rows of ``text`` and ``label``, the topic as text.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in SIZES:
        raise ValueError(f"The generated corpus has the splits {', '.join(SIZES)}, got {split!r}.")
    generator = random.Random(f"{split} {seed}")
    rows: dict[str, str] = {}
    while len(rows) < (SIZES[split] if size is None else size):
        text, topic = _row(generator)
        if list(SIZES)[zlib.crc32(text.encode()) % len(SIZES)] == split:
            rows.setdefault(text, topic)
    return Dataset.from_dict({"text": list(rows), "label": list(rows.values())})


def _row(generator: random.Random) -> tuple[str, str]:
    topic = generator.choice(list(TOPICS))
    other = generator.choice([name for name in TOPICS if name != topic])
    fillers = {
        "{own}": lambda: generator.choice(TOPICS[topic].split()),
        "{other}": lambda: generator.choice(TOPICS[other].split()),
        "{day}": lambda: generator.choice(DAYS),
        "{year}": lambda: str(generator.randint(1990, 2025)),
    }
    template = generator.choice(TEMPLATES)
    text = " ".join(fillers[word]() if word in fillers else word for word in template.split())
    return text, topic

"""The embedded corpus: news-like sentences with names of people, places and companies, made on the spot."""

import random
import re
import zlib

from datasets import Dataset
from faker import Faker

from meta_trainer.tasks.ner.templates import ENTITY_SLOTS, FILLERS, TEMPLATES

SOURCE_LOCALE = "en_US"
TARGET_LOCALE = "fi_FI"
# News name people, places and companies from abroad too; such names are what both languages share.
ABROAD = {"en": "fi_FI", "fi": "en_US"}
ABROAD_SHARE = 0.3
SIZES = {"train": 2000, "validation": 200, "test": 500}
# A name belongs to the split that its checksum falls to, of five parts.
SHARES = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}


def generate_corpus(locale: str, split: str, seed: int = 0, size: int | None = None) -> Dataset:
    """Generate one split of the corpus, the same for the same arguments.

    No name of a split occurs in another one: people, places and companies are told apart by their full text.
    Sentence templates are shared, and so are parts of names: a first name, or a surname within a company.

    Args:
        locale: A Faker locale whose language has templates: ``en_US``, ``en_GB``, ``fi_FI`` ...
        split: ``train``, ``validation`` or ``test``.
        seed: Seed of templates and names.
        size: Sentences; a smaller split is the beginning of a larger one. None: 2000, 200 or 500.

    Returns:
        Rows of ``tokens`` and ``ner_tags`` (IOB2 tags of PER, LOC and ORG, as text).

    Raises:
        ValueError: If there is no such split, no such locale, or no templates in its language.
    """
    if split not in SIZES:
        raise ValueError(f"The generated corpus has the splits {', '.join(SIZES)}, got {split!r}.")
    writer = _Writer(locale, split, seed)
    rows = [writer.sentence() for _ in range(SIZES[split] if size is None else size)]
    return Dataset.from_dict({"tokens": [tokens for tokens, _ in rows], "ner_tags": [tags for _, tags in rows]})


class _Writer:
    """Fills templates of one language with names of one locale and split."""

    def __init__(self, locale: str, split: str, seed: int) -> None:
        self.language = locale.partition("_")[0]
        if self.language not in TEMPLATES:
            raise ValueError(
                f"The generated corpus has sentences in {', '.join(TEMPLATES)}; locale {locale!r} is in no "
                "such language."
            )
        try:
            self.home, self.abroad = Faker(locale), Faker(ABROAD[self.language])
        except AttributeError as error:
            raise ValueError(f"Faker knows no locale {locale!r}; try en_US, en_GB or fi_FI.") from error
        self.split = split
        self.random = random.Random(f"{locale} {split} {seed}")
        for faker in (self.home, self.abroad):
            faker.seed_instance(self.random.getrandbits(64))

    def sentence(self) -> tuple[list[str], list[str]]:
        """Return the words of a sentence and their tags."""
        tokens: list[str] = []
        tags: list[str] = []
        for part in self.random.choice(TEMPLATES[self.language]).split():
            slot = part.strip("{}")
            words = re.findall(r"[\w'.-]+|[^\w\s]", self._fill(slot)) if slot != part else [part]
            tokens += words
            is_entity = slot in ENTITY_SLOTS and slot != part
            tags += [f"{'I' if j else 'B'}-{slot}" if is_entity else "O" for j in range(len(words))]
        return tokens, tags

    def _fill(self, slot: str) -> str:
        if slot == "NUM":
            return str(self.random.randint(1, 99))
        if slot not in ENTITY_SLOTS:
            return self.random.choice(FILLERS[self.language][slot])
        while True:
            name = self._name(slot)
            bare_surname = slot == "ORG" and name.isalpha()  # a company that nothing tells from a person
            if not bare_surname and zlib.crc32(name.encode()) % 5 in SHARES[self.split]:
                return name

    def _name(self, slot: str) -> str:
        faker = self.abroad if self.random.random() < ABROAD_SHARE else self.home
        if slot == "LOC":
            return str(faker.city())
        if slot == "ORG":
            return str(faker.company())
        first, last = faker.first_name(), faker.last_name()
        # News texts call people by their surname once they are introduced.
        return last if self.random.random() < 0.3 else f"{first} {last}"

"""Bad texts, made from good ones."""

import random
import string
from collections.abc import Callable, Sequence


def _shuffle(words: list[str], generator: random.Random) -> list[str]:
    return generator.sample(words, len(words))


def _random(words: list[str], generator: random.Random) -> list[str]:
    return ["".join(generator.choices(string.ascii_lowercase, k=len(word))) for word in words]


CORRUPTIONS: dict[str, Callable[[list[str], random.Random], list[str]]] = {"shuffle": _shuffle, "random": _random}


def corrupt_texts(texts: Sequence[str], kind: str, seed: int) -> list[str]:
    """Make every text worse, the same for the same arguments.

    Args:
        texts: Good ones.
        kind: ``shuffle``, the words of each text in a random order: what remains to learn is which words there are; or
            ``random``, every word replaced by as many random letters: nothing remains.
        seed: Of the random numbers.
    """
    generator = random.Random(seed)
    return [" ".join(CORRUPTIONS[kind](text.split(), generator)) for text in texts]

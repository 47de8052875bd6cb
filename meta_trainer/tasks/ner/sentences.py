"""Tagged sentences as plain lists, with what an error message needs to point at one of their words."""

from collections.abc import Iterable
from dataclasses import dataclass
from reprlib import repr as short


@dataclass(frozen=True)
class Sentences:
    """Sentences of one file or split.

    Attributes:
        name: The file, or the data set and its split.
        tokens: Words of each sentence.
        tags: Tag of each word, as text.
        lines: Line of each sentence's first word, for files in which every word has a line.
    """

    name: str
    tokens: list[list[str]]
    tags: list[list[str]]
    lines: list[int] | None = None

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.tokens)

    def select(self, indices: Iterable[int]) -> "Sentences":
        """Return the sentences at ``indices``, in that order."""
        chosen = list(indices)
        return Sentences(
            self.name,
            [self.tokens[i] for i in chosen],
            [self.tags[i] for i in chosen],
            None if self.lines is None else [self.lines[i] for i in chosen],
        )

    def where(self, sentence: int, token: int | None = None) -> str:
        """Describe a place, counted from 1 as an editor does; ``sentence`` and ``token`` count from 0."""
        place = f"{self.name}, sentence {sentence + 1}"
        if token is not None:
            place += f", token {token + 1} {short(self.tokens[sentence][token])}"
        if self.lines is not None:
            place += f" (line {self.lines[sentence] + (token or 0)})"
        return place

"""Tagged sentences as plain lists, with what an error message needs to point at one of their words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from reprlib import repr as short


@dataclass(frozen=True)
class Sentences:
    """Sentences of one file or split.

    Attributes:
        name: The file, or the data set and its split.
        tokens: Words of each sentence.
        tags: Tag of each word, as text.
        lines: Line of each word, for files in which every word has one.
        chosen: Number of each sentence in the file or split, from 0, where not all of them are here in their order.
    """

    name: str
    tokens: list[list[str]]
    tags: list[list[str]]
    lines: list[list[int]] | None = None
    chosen: list[int] | None = None

    @property
    def rows(self) -> Sequence[int]:
        """Number of each sentence in the file or split, from 0."""
        return range(len(self)) if self.chosen is None else self.chosen

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
            [self.rows[i] for i in chosen],
        )

    def where(self, sentence: int, token: int | None = None) -> str:
        """Describe a place, counted from 1 as an editor does; ``sentence`` and ``token`` count from 0."""
        place = f"{self.name}, sentence {sentence + 1}"
        if token is not None:
            place += f", token {token + 1} {short(self.tokens[sentence][token])}"
        if self.lines is not None:
            place += f" (line {self.lines[sentence][token or 0]})"
        return place


def concatenate(parts: Sequence[Sentences]) -> Sentences:
    """Put parts of one file or split one after another; at least one of them."""
    return Sentences(
        parts[0].name,
        [words for part in parts for words in part.tokens],
        [tags for part in parts for tags in part.tags],
        chosen=[row for part in parts for row in part.rows],
    )

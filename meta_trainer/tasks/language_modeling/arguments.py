"""Settings of language modeling on a mixture of sources, checked before anything is loaded."""

from dataclasses import dataclass, field

from meta_trainer.tasks.language_modeling.corruption import CORRUPTIONS
from meta_trainer.tasks.language_modeling.locations import Location
from meta_trainer.tasks.trusted_rows import TrustedRowsArguments

LOCATION = "a parquet, json, jsonl, csv or txt file, or DATA[:SUBSET][@SPLIT] of the Hub or a local folder"


@dataclass
class LanguageModelingArguments(TrustedRowsArguments):
    """Which texts there are, where each comes from, which of them are trusted, and which are made worse."""

    sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Texts to train on, each NAME=LOCATION: {LOCATION}; 'generated[:TOPIC]' for the embedded corpus. "
            "Sources with the same location share its texts out."
        },
    )
    domain_column: str | None = field(
        default=None,
        metadata={"help": "Column that names the source of each row, for a single entry of sources that mixes them."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of the texts, where there are columns."})
    max_source_examples: int | None = field(
        default=None, metadata={"help": "Texts of each source, drawn at random; none: all."}
    )
    trusted_source: str | None = field(
        default=None,
        metadata={"help": "Name of the source that num_meta_examples texts are set apart from, before all else."},
    )
    num_meta_examples: int = field(
        default=200, metadata={"help": "Trusted texts, with a meta module or without; only with trusted_source."}
    )
    meta_texts: str | None = field(
        default=None, metadata={"help": f"Instead of trusted_source, trusted texts: {LOCATION}."}
    )
    validation_texts: str | None = field(
        default=None, metadata={"help": f"Texts scored during training: {LOCATION}; none: no such set."}
    )
    test_texts: str | None = field(
        default=None, metadata={"help": f"Texts scored at the end: {LOCATION}; none: no such set."}
    )
    max_eval_examples: int | None = field(
        default=None, metadata={"help": "Texts of each scored set, the first ones; none: all."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that relative paths start from; none: $META_TRAINER_DATA, else the current one."},
    )
    corrupt_sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sources to make worse, each NAME=KIND: 'shuffle' puts the words of each text in a random order, "
            "'random' replaces every word by random letters; none: no source."
        },
    )
    corruption_seed: int | None = field(
        default=None, metadata={"help": "Seed of the corruption; none: that of the run."}
    )
    subset_seed: int = field(default=0, metadata={"help": "Seed of the draws of texts."})
    block_length: int = field(
        default=128, metadata={"help": "Tokens of an example: the texts of one source, one after another, cut up."}
    )

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        self._check_values()
        for name, location in self.locations.items():
            location.check(f"sources: {name}", self.data_dir)
        self._check_domains()
        self._check_trusted()
        for setting in ("meta_texts", "validation_texts", "test_texts"):
            value = getattr(self, setting)
            if value is not None:
                Location.parse(value).check(setting, self.data_dir)

    @property
    def locations(self) -> dict[str, Location]:
        """Where the texts of each source are, by its name."""
        return {name: Location.parse(value) for name, value in _pairs("sources", self.sources).items()}

    @property
    def corruptions(self) -> dict[str, str]:
        """How sources are made worse, by name; without the others."""
        return _pairs("corrupt_sources", self.corrupt_sources)

    @property
    def dataset_name(self) -> str:
        """The data, as a model card names them."""
        return ", ".join(dict.fromkeys(location.name for location in self.locations.values()))

    def _check_values(self) -> None:
        for name, least in (
            ("max_source_examples", 1), ("max_eval_examples", 1), ("num_meta_examples", 0), ("subset_seed", 0),
            ("corruption_seed", 0), ("block_length", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")

    def _check_domains(self) -> None:
        if not self.sources:
            raise ValueError("No texts to train on: give sources.")
        if self.domain_column is not None and len(self.sources) > 1:
            raise ValueError(
                f"domain_column={self.domain_column!r} is for one entry of sources that mixes them, got "
                f"{len(self.sources)}: leave it out, or give one."
            )
        for name, kind in self.corruptions.items():
            if kind not in CORRUPTIONS:
                raise ValueError(f"corrupt_sources: {name}={kind} should be one of {', '.join(CORRUPTIONS)}.")
            self._check_source("corrupt_sources", name)

    def _check_trusted(self) -> None:
        self._check_trusted_rows()
        if self.trusted_source is None:
            return
        if self.meta_texts is not None:
            raise ValueError("trusted_source and meta_texts exclude each other: give one of them.")
        self._check_source("trusted_source", self.trusted_source)
        if self.trusted_source in self.corruptions:
            raise ValueError(f"trusted_source={self.trusted_source!r} is among corrupt_sources: choose another.")

    def _check_source(self, setting: str, name: str) -> None:
        # Names in a column are known once it has been read.
        if self.domain_column is None and name not in self.locations:
            raise ValueError(f"{setting}: there is no source {name!r}; the sources are {', '.join(self.locations)}.")


def _pairs(setting: str, entries: list[str]) -> dict[str, str]:
    """Entries NAME=VALUE as a dictionary."""
    pairs = [entry.partition("=") for entry in entries]
    for entry, (name, _, value) in zip(entries, pairs, strict=True):
        if not name or not value:
            raise ValueError(f"{setting}: each entry should read NAME=VALUE, got {entry!r}.")
    names = [name for name, _, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{setting}: each name should be there once, got {', '.join(repeated)} more than once.")
    return {name: value for name, _, value in pairs}

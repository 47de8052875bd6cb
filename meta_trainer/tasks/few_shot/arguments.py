"""Settings of cross-domain few-shot classification, checked before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import isfile
from typing import Literal

from meta_trainer.tasks.few_shot.relation_net import DEPTHS, STEMS
from meta_trainer.tasks.locations import check_data, check_file, locate
from meta_trainer.tasks.tables import TABLE_SUFFIXES

MINIMUM_DOMAINS = 3


@dataclass
class FewShotArguments:
    """Which image sets there are, which of them is held out, how episodes are made, and the model."""

    domains: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Image sets as name=place, the place a parquet, json, jsonl or csv file, a Hub data set or a local "
            "folder; at least two to train on and the one that is held out."
        },
    )
    held_out_domain: str | None = field(
        default=None, metadata={"help": "Name of the domain of the test episodes; no class of it is trained on."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that relative paths start from; none: $META_TRAINER_DATA, else the current one."},
    )
    domain_split: str = field(default="train", metadata={"help": "Split to read of data sets that are no single file."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes: text or integers."})
    max_images_per_class: int | None = field(
        default=None, metadata={"help": "Images kept of each class, the first ones; none: all. They lie in memory."}
    )
    image_size: int = field(default=224, metadata={"help": "Height and width that images are scaled to."})
    n_way: int = field(default=5, metadata={"help": "Classes of an episode."})
    k_shot: int = field(default=5, metadata={"help": "Support images of each class of an episode."})
    num_queries: int = field(default=16, metadata={"help": "Query images of each class of an episode."})
    num_train_episodes: int = field(
        default=40000, metadata={"help": "Episodes in one pass of training; per_device_train_batch_size in a step."}
    )
    episodes_per_epoch: int = field(
        default=100, metadata={"help": "Episodes after which pseudo-seen and pseudo-unseen domain are drawn anew."}
    )
    num_test_episodes: int = field(default=600, metadata={"help": "Episodes of the held-out domain."})
    backbone: Literal["resnet10", "resnet34"] = field(default="resnet10", metadata={"help": "Feature extractor."})
    backbone_width: int = field(default=64, metadata={"help": "Channels of its first stage."})
    stem: Literal["imagenet", "small", "small_pooled"] = field(
        default="imagenet",
        metadata={
            "help": "imagenet: 7x7 convolution of stride 2 and pooling; small: 3x3 of stride 1, for images of 32 "
            "pixels; small_pooled: the same, halved by pooling."
        },
    )
    fixed_transform: bool = field(
        default=False,
        metadata={"help": "Train with the hand-tuned feature-wise transformation, which does not learn: a baseline."},
    )
    auxiliary_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the auxiliary loss, a classifier over all training classes; in the course of training "
            "it falls to an eighth. 0: no such loss."
        },
    )

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        self._check_values()
        places = self.places
        if len(places) < MINIMUM_DOMAINS:
            raise ValueError(
                f"domains: expected at least {MINIMUM_DOMAINS} entries such as birds=birds.parquet, two to train on "
                f"and one to hold out, got {len(places)}."
            )
        if self.held_out_domain not in places:
            raise ValueError(
                f"held_out_domain should be one of {', '.join(places)}, got {self.held_out_domain!r}: the model is "
                "tested on it."
            )
        for name, place in places.items():
            if place.endswith(TABLE_SUFFIXES) or isfile(locate(place, self.data_dir)):
                check_file(f"domains, {name}", place, self.data_dir, TABLE_SUFFIXES)
            else:
                check_data(f"domains, {name}", place, self.data_dir)

    @property
    def places(self) -> dict[str, str]:
        """Where each domain is, by name, in the given order.

        Raises:
            ValueError: If an entry of `domains` is not of the form name=place, or a name is there twice.
        """
        places: dict[str, str] = {}
        for entry in self.domains:
            name, equals, place = entry.partition("=")
            if not (name and equals and place):
                raise ValueError(f"domains: expected entries such as birds=birds.parquet, got {entry!r}.")
            if name in places:
                raise ValueError(f"domains names {name!r} twice: {places[name]!r} and {place!r}.")
            places[name] = place
        return places

    @property
    def training_domains(self) -> list[str]:
        """All but the one that is held out."""
        return [name for name in self.places if name != self.held_out_domain]

    @property
    def dataset_name(self) -> str:
        """The data, as a model card names them."""
        return ", ".join(self.training_domains)

    def _check_values(self) -> None:
        if self.backbone not in DEPTHS:
            raise ValueError(f"backbone should be one of {', '.join(DEPTHS)}, got {self.backbone!r}.")
        if self.stem not in STEMS:
            raise ValueError(f"stem should be one of {', '.join(STEMS)}, got {self.stem!r}.")
        self._check_at_least(2, ["n_way"])
        self._check_at_least(
            1,
            ["k_shot", "num_queries", "num_train_episodes", "episodes_per_epoch", "num_test_episodes",
             "backbone_width", "image_size", "max_images_per_class"],
        )  # fmt: skip
        if not self.auxiliary_weight >= 0:
            raise ValueError(f"auxiliary_weight must not be negative, got {self.auxiliary_weight}.")

    def _check_at_least(self, smallest: int, names: Sequence[str]) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}.")

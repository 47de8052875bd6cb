"""Settings of image classification, checked before anything is loaded."""

import math
from dataclasses import dataclass, field
from typing import Literal

from meta_trainer.tasks.class_labels import ClassLabelArguments


@dataclass
class ImageClassificationArguments(ClassLabelArguments):
    """Where images and labels come from, which of them are trusted, how either is changed, and which model reads them.

    The data are either a data set (``data``) or single files (``train_file`` ...), never both.
    """

    rows = "images"

    train_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Instead of data: parquet, json, jsonl or csv files to train on, one after another."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images: files, or their content."})
    max_test_examples: int | None = field(
        default=None, metadata={"help": "Images scored at the end, drawn at random by subset_seed; none: all."}
    )
    rotate_train_degrees: float = field(
        default=0.0, metadata={"help": "Angle by which all images to train on are turned, counter-clockwise."}
    )
    rotate_target_degrees: float = field(
        default=0.0,
        metadata={"help": "Angle by which meta, validation and test images are turned: a target domain of its own."},
    )
    random_crop_padding: int = field(
        default=0,
        metadata={"help": "Training images are shifted at random by up to this many pixels, mirrored at the edges."},
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Every other training image, at random, is turned left to right."}
    )
    image_model: Literal["lenet", "resnet8", "resnet20", "resnet32"] = field(
        default="lenet",
        metadata={"help": "Model that is trained from scratch where model_name_or_path names no pretrained one."},
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "From scratch: side of the square that images are resized to; none: that of the first one."},
    )
    image_mean: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={"help": "From scratch: mean of the pixels, between 0 and 1, of each channel or of all alike."},
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={"help": "From scratch: standard deviation of the pixels, of each channel or of all alike."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work, naming the setting to change."""
        if isinstance(self.train_file, str):
            self.train_file = [self.train_file]
        super().__post_init__()
        for name, least in (("max_test_examples", 1), ("image_size", 1), ("random_crop_padding", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        for name in ("rotate_train_degrees", "rotate_target_degrees"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number of degrees, got {getattr(self, name)}.")
        trains_on_meta = self.train_on_meta or self.train_on_meta_alone
        if trains_on_meta and self.rotate_train_degrees != self.rotate_target_degrees:
            name = "train_on_meta_alone" if self.train_on_meta_alone else "train_on_meta"
            raise ValueError(
                f"{name} trains on images of the meta set, which cannot be turned by two angles: got "
                f"rotate_train_degrees={self.rotate_train_degrees} and "
                f"rotate_target_degrees={self.rotate_target_degrees}."
            )
        self._check_pixels()

    def _check_pixels(self) -> None:
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be one number, or three for red, green and blue, got {values}.")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be above 0, got {self.image_std}.")

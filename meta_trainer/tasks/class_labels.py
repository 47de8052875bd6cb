"""Settings of labelled rows that have one class each."""

from dataclasses import dataclass, field
from typing import Literal

from meta_trainer.tasks.labelled_data import LabelledDataArguments


@dataclass
class ClassLabelArguments(LabelledDataArguments):
    """Which columns hold the classes of rows, and how classes are corrupted."""

    label_column: str = field(
        default="label", metadata={"help": "Column of the trusted labels: text or integers, named or not."}
    )
    train_label_column: str | None = field(
        default=None,
        metadata={"help": "Column of noisy labels to train on; all other sets keep label_column."},
    )
    label_noise: Literal["none", "uniform", "flip"] = field(
        default="none",
        metadata={"help": "Corrupt labels to train on: by any other class (uniform), or by one for each class (flip)."},
    )
    balance_meta_set: bool = field(
        default=True,
        metadata={
            "help": "Draw as many rows of each class for the meta set; false: classes come as they come in the data, "
            "which a rare class makes the better choice where the test set has it as rarely."
        },
    )

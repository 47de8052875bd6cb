"""What the constructors of meta modules take for granted."""

from __future__ import annotations

from typing import Any

from meta_trainer.hypergrad.checks import is_integer


def check_size(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a size that a layer can have.

    Args:
        name: Of the setting.
        value: Of the setting.
    """
    if not is_integer(value) or value < 1:
        raise ValueError(f"`{name}` should be a positive, whole number, got {value!r}.")

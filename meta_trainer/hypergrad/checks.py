"""Is a setting a number at all: what a comparison with zero or a loop over candidates takes for granted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_SINGLE = torch.finfo(torch.float32)


def is_number(value: Any) -> bool:
    """Whether `value` is a number of Python or numpy; True, False and text are none."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or numpy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Whether `value` is a positive, finite number that single precision can hold."""
    return is_number(value) and bool(_SINGLE.tiny <= value <= _SINGLE.max)


def is_not_negative(value: Any) -> bool:
    """Whether `value` is zero, or a positive, finite number that single precision can hold."""
    return is_number(value) and bool(0 <= value <= _SINGLE.max)

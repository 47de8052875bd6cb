"""What may become of bad input: success, or one clear error of this package."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from hypothesis import settings

import meta_trainer

PACKAGE = Path(meta_trainer.__file__).parent
TRANSFORMERS = Path(transformers.__file__).parent
# The checks of Trainer's own fields, and of words that are no setting.
THEIR_CHECKS = {TRANSFORMERS / "training_args.py", TRANSFORMERS / "hf_argparser.py"}
LONGEST_MESSAGE = 2000
REFUSED = object()


def attempt(action: Callable[[], Any]) -> Any:
    """What `action` returns, or REFUSED if it ends in an error of ours; any other error goes on its way."""
    with restored_environment():
        try:
            return action()
        except (ValueError, NotImplementedError) as error:
            if not is_ours(error):
                raise
            return REFUSED


def is_ours(error: BaseException) -> bool:
    """Whether an error is of one of our kinds, was raised where input is checked, and says something."""
    if type(error) not in (ValueError, NotImplementedError):
        return False
    innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    known = innermost.is_relative_to(PACKAGE) or innermost in THEIR_CHECKS
    return known and 10 < len(str(error)) <= LONGEST_MESSAGE


@contextmanager
def restored_environment() -> Iterator[None]:
    """`TrainingArguments` pass some of their fields on through environment variables."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def cases(number: int) -> settings:
    """Draw that many cases; META_TRAINER_FUZZ names a factor for a longer run."""
    return settings(max_examples=number * int(os.environ.get("META_TRAINER_FUZZ", "1")))

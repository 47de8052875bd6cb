"""Tiny training runs are those of the trainer's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "trainer"))

"""Capture and replay of every global random-number generator that a forward pass may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The global random state of Python, NumPy, PyTorch on the CPU and on the devices in use."""

    python: object
    numpy: Any
    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """Read the state of the CPU and of each accelerator among `devices`."""
        accelerators = {device for device in devices if device.type not in ("cpu", "meta")}
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),
            cpu=torch.random.get_rng_state(),
            devices={d: torch.get_device_module(d).get_rng_state(d) for d in accelerators},
        )

    def restore(self) -> None:
        """Set every generator back to the captured state; may be called any number of times."""
        random.setstate(self.python)  # type: ignore[arg-type]
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def preserved_random_state(devices: Iterable[torch.device] = ()) -> Iterator[RandomState]:
    """Give the global random state back as it was found, also after an exception."""
    state = RandomState.capture(devices)
    try:
        yield state
    finally:
        state.restore()

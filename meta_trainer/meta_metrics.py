"""What the meta steps since the last log have to say, summed on the device."""

from __future__ import annotations

from torch import Tensor


class MetaMetrics:
    """Running means that touch the host only when they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Add one value, a scalar tensor, to each mean."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.detach() if name in self._sums else value.detach().clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Means under ``meta/<name>``; starts anew."""
        means = {f"meta/{name}": (total / self._counts[name]).item() for name, total in self._sums.items()}
        self.__init__()  # type: ignore[misc]
        return means

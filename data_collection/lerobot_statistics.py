"""The statistics that LeRobotDataset v3.0 stores per episode and per dataset, computed exactly.

LeRobot itself estimates quantiles from a histogram of sampled frames and merges episodes by averaging their quantiles,
which is wrong for skewed data. Here vectors keep every value and images count every pixel value, so that merging is
exact and equals ``np.quantile`` over all frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
KEYS = ("min", "max", "mean", "std", "count", *QUANTILES)
"""Every key of a feature's statistics, in the order in which lerobot writes them; all of them must be present."""

Summary = dict[str, np.ndarray]


class ValueStatistics:
    """Statistics per element of numeric rows ``(T, ...)``. Memory grows with the data: 8 MB per million float64."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def update(self, rows: np.ndarray) -> None:
        """Add rows ``(T, ...)``; scalars per step ``(T,)`` count as ``(T, 1)``."""
        self._parts.append(rows[:, None] if rows.ndim == 1 else rows)

    def merge(self, other: ValueStatistics) -> None:
        """Add everything that ``other`` has seen."""
        self._parts += other._parts

    def summary(self) -> Summary:
        """Key of :data:`KEYS` -> array of one row's shape; ``count`` is ``(1,)``.

        ``std`` is that of the population; ``min`` and ``max`` of booleans stay booleans, as lerobot writes them.
        """
        rows = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        self._parts = [rows]
        exact = rows.astype(np.float64)
        numbers = rows if rows.dtype == bool else exact
        result = {"min": numbers.min(axis=0), "max": numbers.max(axis=0)}
        result |= {"mean": exact.mean(axis=0), "std": exact.std(axis=0), "count": np.array([len(rows)])}
        values = np.quantile(exact, list(QUANTILES.values()), axis=0)
        return result | dict(zip(QUANTILES, values, strict=True))


class ImageStatistics:
    """Statistics per channel of RGB frames, scaled to [0, 1], from the count of every pixel value (3 x 256 numbers)."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)
        self._frames = 0

    def update(self, frames: np.ndarray) -> None:
        """Add frames ``(T, H, W, 3)`` uint8."""
        for channel in range(3):
            self._counts[channel] += np.bincount(frames[..., channel].reshape(-1), minlength=256)
        self._frames += len(frames)

    def merge(self, other: ImageStatistics) -> None:
        """Add everything that ``other`` has seen."""
        self._counts += other._counts
        self._frames += other._frames

    def summary(self) -> Summary:
        """Key of :data:`KEYS` -> ``(3, 1, 1)``; ``count`` is the number of frames ``(1,)``."""
        values = np.arange(256) / 255.0
        total = self._counts.sum(axis=1)
        below = np.cumsum(self._counts, axis=1)
        mean = self._counts @ values / total
        variance = (self._counts * (values - mean[:, None]) ** 2).sum(axis=1) / total

        def order_statistic(ranks: np.ndarray) -> np.ndarray:
            """Value of the pixel with the given rank (0 is the smallest) per channel."""
            return np.array([values[np.searchsorted(below[c], ranks[c], side="right")] for c in range(3)])

        def quantile(share: float) -> np.ndarray:
            # Linear interpolation between neighbouring ranks, numpy's default.
            position = share * (total - 1)
            lower = np.floor(position).astype(np.int64)
            low, high = order_statistic(lower), order_statistic(np.minimum(lower + 1, total - 1))
            return low + (high - low) * (position - lower)

        result = {"min": quantile(0.0), "max": quantile(1.0), "mean": mean, "std": np.sqrt(variance)}
        result |= {name: quantile(share) for name, share in QUANTILES.items()}
        shaped = {name: array.reshape(3, 1, 1) for name, array in result.items()}
        return {**shaped, "count": np.array([self._frames])}


Statistics = ValueStatistics | ImageStatistics


def to_json(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """Content of ``meta/stats.json``: feature -> key -> nested lists."""
    return {feature: {key: summary[key].tolist() for key in KEYS} for feature, summary in summaries.items()}

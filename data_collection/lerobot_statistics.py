"""The statistics that LeRobotDataset v3.0 stores per episode and per dataset, exact in both.

LeRobot itself estimates quantiles from a histogram of sampled frames and merges episodes by averaging their quantiles,
which is wrong for skewed data; here they are those of all frames (:mod:`simtoreal.data_collection.statistics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from simtoreal.data_collection.statistics import ImageStatistics, VectorStatistics

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
KEYS = ("min", "max", "mean", "std", "count", *QUANTILES)
"""Every key of a feature's statistics, in the order in which lerobot writes them; all of them must be present."""

Summary = dict[str, np.ndarray]


class FeatureStatistics:
    """Statistics of one feature, numbers or RGB images, to which episodes are added.

    Args:
        image: whether rows are frames ``(T, H, W, 3)`` uint8; otherwise numbers ``(T, ...)`` per element.
    """

    def __init__(self, image: bool) -> None:
        self._image = image
        self._parts: list[Any] = []
        self._shape: tuple[int, ...] = (3, 1, 1)
        self._boolean = False

    def update(self, rows: np.ndarray) -> None:
        """Add the rows of an episode; scalars per step ``(T,)`` count as ``(T, 1)``."""
        if self._image:
            self._parts.append(ImageStatistics.of(rows))
            return
        self._shape, self._boolean = rows.shape[1:] or (1,), rows.dtype == bool
        self._parts.append(VectorStatistics.of(rows.reshape(len(rows), -1)))

    def merge(self, other: FeatureStatistics) -> None:
        """Add everything that ``other``, of the same feature, has seen."""
        self._parts += other._parts
        self._shape, self._boolean = other._shape, other._boolean

    def summary(self) -> Summary:
        """Key of :data:`KEYS` -> array of one row's shape, ``(3, 1, 1)`` in [0, 1] for images; ``count`` is ``(1,)``.

        ``std`` is that of the population; ``min`` and ``max`` of booleans stay booleans, as lerobot writes them.
        """
        total = self._parts[0] if len(self._parts) == 1 else type(self._parts[0]).merge(self._parts)
        self._parts = [total]
        values = {"min": total.minimum, "max": total.maximum, "mean": total.mean, "std": total.std}
        values |= {name: total.quantile(share) for name, share in QUANTILES.items()}
        scale = 255.0 if self._image else 1.0
        result = {name: (value / scale).reshape(self._shape) for name, value in values.items()}
        if self._boolean:
            result |= {name: result[name] > 0 for name in ("min", "max")}
        return {**result, "count": np.array([total.frames if self._image else total.count])}


def to_json(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """Content of ``meta/stats.json``: feature -> key -> nested lists."""
    return {feature: {key: summary[key].tolist() for key in KEYS} for feature, summary in summaries.items()}

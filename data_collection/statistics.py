"""Exact statistics of arrays that can be computed per episode and merged.

Count, minimum, maximum, mean and variance merge easily; quantiles do not: the mean of the episodes' quantiles, weighted
or not, is not the quantile of all steps as soon as episodes differ (one long episode at rest is enough). So what is
kept and merged here is lossless: the sorted values of vectors, a histogram of the 256 values of images. Everything else
follows from that, which makes a merge independent of the order and of how the steps were cut into episodes, to the
last bit, and equal to ``numpy.quantile`` over all steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import array_names, open_episode
from simtoreal.envs.errors import DatasetError

# The percentiles that policies are normalised by (Barreiros et al. 2025, LBM).
PERCENTILES = (2.0, 98.0)
_LEVELS = 256


@dataclass(frozen=True)
class VectorStatistics:
    """Statistics of vectors, per dimension.

    Attributes:
        ordered: ``(D, N)`` the values of every dimension in ascending order, in their stored type.
    """

    ordered: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> VectorStatistics:
        """Return the statistics of ``rows`` ``(N, D)``, finite numbers.

        Raises:
            DatasetError: another shape, no rows, or values that are not finite.
        """
        if rows.ndim != 2 or not len(rows) or not np.isfinite(rows).all():
            raise DatasetError(f"statistics need finite rows (steps, dimensions), at least one; got {rows.shape}")
        return cls(np.sort(rows.T, axis=1))

    @classmethod
    def merge(cls, parts: Iterable[VectorStatistics]) -> VectorStatistics:
        """Return the statistics of all steps of ``parts`` together.

        Raises:
            DatasetError: no parts, or they have different dimensions.
        """
        ordered = [part.ordered for part in parts]
        _require_one_size([len(array) for array in ordered])
        # A stable sort finds the sorted runs and merges them.
        return cls(np.sort(np.concatenate(ordered, axis=1), axis=1, kind="stable"))

    @property
    def count(self) -> int:
        """Number of steps."""
        return int(self.ordered.shape[1])

    @property
    def minimum(self) -> np.ndarray:
        """``(D,)`` float64."""
        return self.ordered[:, 0].astype(np.float64)

    @property
    def maximum(self) -> np.ndarray:
        """``(D,)`` float64."""
        return self.ordered[:, -1].astype(np.float64)

    @property
    def mean(self) -> np.ndarray:
        """``(D,)`` float64."""
        return self.ordered.mean(axis=1, dtype=np.float64)

    @property
    def std(self) -> np.ndarray:
        """``(D,)`` float64, of the population (divided by the count)."""
        return self.ordered.std(axis=1, dtype=np.float64)

    def quantile(self, q: float) -> np.ndarray:
        """Return the quantile ``q`` in [0, 1], ``(D,)``, interpolated as ``numpy.quantile`` does by default."""
        lower, upper, part = _position(self.count, q)
        return _between(self.ordered[:, lower].astype(np.float64), self.ordered[:, upper].astype(np.float64), part)


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of 8-bit images, per channel over all pixels.

    Attributes:
        counts: ``(C, 256)`` int64, how often every value occurs.
        frames: number of images.
    """

    counts: np.ndarray
    frames: int

    @classmethod
    def of(cls, images: np.ndarray) -> ImageStatistics:
        """Return the statistics of ``images`` uint8 ``(N, H, W, C)``.

        Raises:
            DatasetError: another type or shape, or no images.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise DatasetError(f"statistics need uint8 images (steps, H, W, C); got {images.dtype} {images.shape}")
        channels = images.reshape(-1, images.shape[-1])
        counts = np.stack([np.bincount(channels[:, c], minlength=_LEVELS) for c in range(images.shape[-1])])
        return cls(counts.astype(np.int64), len(images))

    @classmethod
    def merge(cls, parts: Iterable[ImageStatistics]) -> ImageStatistics:
        """Return the statistics of all images of ``parts`` together.

        Raises:
            DatasetError: no parts, or they have different channels.
        """
        parts = list(parts)
        _require_one_size([len(part.counts) for part in parts])
        return cls(np.sum([part.counts for part in parts], axis=0), sum(part.frames for part in parts))

    @property
    def count(self) -> int:
        """Number of pixels."""
        return int(self.counts[0].sum())

    @property
    def minimum(self) -> np.ndarray:
        """``(C,)`` float64."""
        return (self.counts > 0).argmax(axis=1).astype(np.float64)

    @property
    def maximum(self) -> np.ndarray:
        """``(C,)`` float64."""
        return (_LEVELS - 1 - (self.counts[:, ::-1] > 0).argmax(axis=1)).astype(np.float64)

    @property
    def mean(self) -> np.ndarray:
        """``(C,)`` float64, rounded once."""
        return np.array([first / self.count for first, _ in self._moments()])

    @property
    def std(self) -> np.ndarray:
        """``(C,)`` float64, of the population."""
        n = self.count
        return np.array([math.sqrt((n * second - first * first) / (n * n)) for first, second in self._moments()])

    def quantile(self, q: float) -> np.ndarray:
        """Return the quantile ``q`` in [0, 1], ``(C,)``, interpolated as ``numpy.quantile`` does by default."""
        lower, upper, part = _position(self.count, q)
        below = np.cumsum(self.counts, axis=1)
        first = np.array([np.searchsorted(row, lower, side="right") for row in below], dtype=np.float64)
        second = np.array([np.searchsorted(row, upper, side="right") for row in below], dtype=np.float64)
        return _between(first, second, part)

    def _moments(self) -> list[tuple[int, int]]:
        """Sum and sum of squares per channel, in whole numbers of any size."""
        return [
            (
                sum(value * int(count) for value, count in enumerate(row)),
                sum(value * value * int(count) for value, count in enumerate(row)),
            )
            for row in self.counts
        ]


def _require_one_size(sizes: Sequence[int]) -> None:
    if not sizes or len(set(sizes)) != 1:
        raise DatasetError(f"statistics of {sizes or 'no'} dimensions cannot be merged; they must agree")


def _position(count: int, q: float) -> tuple[int, int, float]:
    if not 0 <= q <= 1:
        raise ValueError(f"quantile {q} is not between 0 and 1")
    place = (count - 1) * q
    lower = math.floor(place)
    return lower, min(lower + 1, count - 1), place - lower


def _between(low: np.ndarray, high: np.ndarray, part: float) -> np.ndarray:
    # As numpy does it: from the nearer end, so that the result is monotonic in q.
    return high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part


def plain_statistics(values: VectorStatistics | ImageStatistics) -> dict[str, list[float]]:
    """Return mean, std, min, max and the 2nd and 98th percentile as lists, for JSON."""
    columns = {"mean": values.mean, "std": values.std, "min": values.minimum, "max": values.maximum}
    columns |= {f"percentile_{percent:g}": values.quantile(percent / 100) for percent in PERCENTILES}
    return {name: column.tolist() for name, column in columns.items()}


def dataset_statistics(dataset: Dataset) -> dict[str, Any]:
    """Counts, shape and type of every array, and per-dimension statistics of actions and vectors of a dataset.

    They cover all episodes; a policy computes its own over the episodes it is trained on.

    Raises:
        DatasetError: an episode is damaged, or holds values that are not finite.
    """
    summary: dict[str, Any] = {
        "episodes": len(dataset.episodes),
        "successes": sum(episode.success for episode in dataset.episodes),
        "steps": sum(episode.steps for episode in dataset.episodes),
        "arrays": {},
        "values": {},
    }
    rows: dict[str, list[np.ndarray]] = {}
    for episode in dataset.episodes:
        with open_episode(Path(str(episode.path))) as file:
            for name in array_names(file):
                if name != "actions" and not name.startswith(("obs/", "step/")):
                    continue
                shape = file[name].shape[1:]
                summary["arrays"].setdefault(name, {"shape": list(shape), "dtype": str(file[name].dtype)})
                if len(shape) == 1 and shape[0] and file[name].dtype.kind == "f":
                    part = file[name][()]
                    if not np.isfinite(part).all():
                        raise DatasetError(f"{episode.path}: '{name}' holds values that are not finite.")
                    rows.setdefault(name, []).append(part)
    for name in list(rows):
        if len({part.shape[1] for part in rows[name]}) > 1:
            continue  # Of tasks with different objects: there is no dimension to describe.
        summary["values"][name] = plain_statistics(VectorStatistics.of(np.concatenate(rows.pop(name))))
    return summary


def difference(stored: Mapping[str, Any], computed: Mapping[str, Any]) -> list[str]:
    """Return one line per entry in which two results of :func:`dataset_statistics` differ by more than rounding."""
    lines = [
        f"{key} is {stored.get(key)}, should be {computed[key]}"
        for key in ("episodes", "successes", "steps", "arrays")
        if stored.get(key) != computed[key]
    ]
    ours = computed["values"]
    theirs = stored.get("values") if isinstance(stored.get("values"), dict) else {}
    for name in sorted({*ours, *theirs}):
        for key in ours.get(name, {"mean": ()}):
            wanted = np.asarray(ours.get(name, {}).get(key, ()), dtype=np.float64)
            try:
                found = np.asarray(theirs.get(name, {}).get(key, ()), dtype=np.float64)
            except (TypeError, ValueError, AttributeError):
                found = np.empty(0)
            if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-9, atol=1e-12):
                lines.append(f"values/{name}/{key} is not what the episodes give")
    return lines

"""Intervals of quantities that are no success rate: bootstrap over episodes, which are what is independent.

Frames of one episode are not: resampling them one by one would give intervals that are far too narrow.
"""

from __future__ import annotations

import numpy as np

DRAWS = 2000
LEVEL = 0.95
# A single value is drawn every time: its draws do not differ, and an interval without width would be no uncertainty.
FEWEST_VALUES = 2
# A quantity that hardly varies cannot be explained, and the share explained of it is noise.
SMALLEST_SPREAD = 1e-6


def resample_counts(episodes: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return how often each episode is drawn, ``(draws, episodes)``; the first row holds every one once."""
    counts = np.random.default_rng(seed).multinomial(episodes, np.full(episodes, 1 / episodes), size=draws)
    return np.concatenate([np.ones((1, episodes), np.int64), counts])


def interval(draws: np.ndarray) -> list[float] | None:
    """Return the 95 % percentile interval of ``(D,)`` draws without those that are not finite; None without any."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return None
    return [float(value) for value in np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def mean_with_interval(values: np.ndarray, seed: int = 0) -> dict[str, float | int | list[float] | None]:
    """Return ``mean``, ``interval`` and ``n`` of one value ``(E,)`` per episode; values that are NaN do not count.

    The interval is None for fewer than :data:`FEWEST_VALUES`.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "interval": None, "n": 0}
    means = resample_counts(len(values), seed=seed) @ values / len(values)
    return {
        "mean": float(means[0]),
        "interval": interval(means[1:]) if len(values) >= FEWEST_VALUES else None,
        "n": len(values),
    }


def curve_with_interval(table: np.ndarray, seed: int = 0) -> dict[str, list[float | None] | list[int]]:
    """Return ``mean``, ``low``, ``high`` and ``n`` of every column of a table ``(E, T)``, in which NaN is absent.

    ``low`` and ``high`` are None where fewer than :data:`FEWEST_VALUES` are present.
    """
    present = np.isfinite(table)
    counts = resample_counts(len(table), draws=500, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (counts @ np.where(present, table, 0.0)) / (counts @ present)
    enough = present.sum(0) >= FEWEST_VALUES
    bands = [
        (interval(column) if known else None) or [None, None] for column, known in zip(means[1:].T, enough, strict=True)
    ]
    return {
        "mean": [float(value) if np.isfinite(value) else None for value in means[0]],
        "low": [band[0] for band in bands],
        "high": [band[1] for band in bands],
        "n": present.sum(0).tolist(),
    }


def explained_variance(
    predicted: np.ndarray, actual: np.ndarray, episode: np.ndarray
) -> list[dict[str, float | int | list[float] | None]]:
    """Return R^2 per dimension with an interval over episodes.

    Args:
        predicted, actual: ``(P, D)``.
        episode: ``(P,)`` episode of every row.

    Returns:
        Per dimension ``r2`` (None if it hardly varies), ``interval`` (None also for fewer than :data:`FEWEST_VALUES`
        episodes) and ``n`` (episodes).
    """
    _, group = np.unique(episode, return_inverse=True)
    count = int(group.max()) + 1 if len(group) else 0

    def total(values: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(group, column, minlength=count) for column in values.T.astype(np.float64)], 1)

    actual, predicted = np.asarray(actual, np.float64), np.asarray(predicted, np.float64)
    sizes = np.bincount(group, minlength=count)
    weights = resample_counts(count)
    rows = weights @ sizes
    sums, squares, errors = (weights @ total(values) for values in (actual, actual**2, (predicted - actual) ** 2))
    spread = squares - sums**2 / rows[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = np.where(spread / rows[:, None] > SMALLEST_SPREAD, 1 - errors / spread, np.nan)
    return [
        {
            "r2": float(column[0]) if np.isfinite(column[0]) else None,
            "interval": interval(column[1:]) if count >= FEWEST_VALUES else None,
            "n": count,
        }
        for column in r2.T
    ]

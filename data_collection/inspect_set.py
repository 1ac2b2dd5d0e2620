"""What only shows when the episodes of a dataset are compared: duplicates, drift, and where they began."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays, EpisodeInfo
from simtoreal.data_collection.inspect_motion import MotionScale
from simtoreal.data_collection.same_recording import first_of_recordings
from simtoreal.envs.errors import SimtorealError

# Actions are compared at this many moments of an episode.
PROFILE_STEPS = 32
# Two recordings of the same motion by a person correlate below this; a copy that was cut or resampled is above.
NEAR_DUPLICATE = 0.999
# Episodes of one task within this part of each other's length can be duplicates.
SIMILAR_LENGTH = 0.05
COVERAGE_CELLS = 8
# A trend must be this strong to be called drift, and unlikely at 1 % after correction for the number of dimensions.
DRIFT_CORRELATION, DRIFT_LEVEL, DRIFT_EPISODES = 0.6, 0.01, 12
# Episodes whose deviation from the median exceeds this many scaled median deviations are outliers.
OUTLIER, OUTLIER_EPISODES = 5.0, 8


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What is kept of an episode to compare it with others.

    Attributes:
        name, task: of the episode.
        steps: its length.
        exact: digest of actions and observations of vectors.
        profile: ``(PROFILE_STEPS * A,)`` actions in ranges of the dataset, at evenly spaced moments.
        start: ``(D,)`` first vector observations.
    """

    name: str
    task: str
    steps: int
    exact: str
    profile: np.ndarray
    start: np.ndarray


def fingerprint(info: EpisodeInfo, arrays: Arrays, scale: MotionScale) -> Fingerprint:
    """Return what :func:`find_duplicates` compares."""
    digest = hashlib.sha256(np.ascontiguousarray(arrays["actions"]).tobytes())
    for key in scale.keys:
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    moments = np.linspace(0, info.steps - 1, PROFILE_STEPS)
    span = np.where(scale.spans["actions"] > 1e-9, scale.spans["actions"], 1.0)
    actions = arrays["actions"].astype(np.float64) / span
    profile = np.stack([np.interp(moments, np.arange(info.steps), column) for column in actions.T])
    start = np.concatenate([arrays[key][0].astype(np.float64) for key in scale.keys]) if scale.keys else np.zeros(0)
    return Fingerprint(
        name=info.name, task=info.task, steps=info.steps, exact=digest.hexdigest(), profile=profile.ravel(), start=start
    )


def find_duplicates(prints: Sequence[Fingerprint]) -> list[dict[str, Any]]:
    """Return pairs of episodes that are the same or nearly so, ``{"first", "second", "kind", "correlation"}``.

    Exact ones have the same actions and vectors at every step. Near ones have the same task, almost the same length and
    start, and action profiles that correlate by more than 0.999.
    """
    pairs: list[dict[str, Any]] = []
    by_digest: dict[str, str] = {}
    copies: set[str] = set()
    for one in prints:
        if one.exact in by_digest:
            copies.add(one.name)
            pairs.append({"first": by_digest[one.exact], "second": one.name, "kind": "exact", "correlation": 1.0})
        by_digest.setdefault(one.exact, one.name)
    left = [one for one in prints if one.name not in copies]
    if len(left) < 2:
        return pairs
    profiles = np.stack([one.profile for one in left])
    profiles = profiles - profiles.mean(axis=0)
    norms = np.linalg.norm(profiles, axis=1)
    profiles /= np.where(norms > 1e-9, norms, 1.0)[:, None]
    steps = np.array([one.steps for one in left])
    starts = np.stack([one.start for one in left])
    spread = starts.std(axis=0)
    starts = starts / np.where(spread > 1e-9, spread, 1.0)
    for row, one in enumerate(left):
        correlation = profiles[row + 1 :] @ profiles[row]
        near = (correlation > NEAR_DUPLICATE) & (np.abs(steps[row + 1 :] - steps[row]) <= SIMILAR_LENGTH * steps[row])
        for offset in np.flatnonzero(near):
            other = left[row + 1 + int(offset)]
            apart = np.abs(starts[row] - starts[row + 1 + int(offset)]).max(initial=0.0)
            if other.task == one.task and apart < 0.1:
                kind = {"first": one.name, "second": other.name, "kind": "near"}
                pairs.append({**kind, "correlation": float(correlation[offset])})
    return pairs


def trimmed_copies(episodes: Sequence[EpisodeInfo]) -> list[dict[str, Any]]:
    """Return pairs of episodes with steps of the same recording and different lengths, as :func:`find_duplicates` does.

    Raises:
        DatasetError: an episode is damaged.
    """
    pairs = [(episodes[first], info) for first, info in zip(first_of_recordings(episodes), episodes, strict=True)]
    return [
        {"first": first.name, "second": second.name, "kind": "trimmed", "correlation": 1.0}
        for first, second in pairs
        if first.steps != second.steps
    ]


def find_drift(values: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return the quantities that change steadily from the first to the last episode.

    Args:
        values: name -> one value per episode, in their order. Where an episode begins is drawn at random, so a trend
            means that something was moved: a camera, a light, a calibration, the way an operator starts.
    """
    from scipy.stats import spearmanr

    found = []
    for name, series in values.items():
        numbers = np.asarray(series, dtype=np.float64)
        if len(numbers) < DRIFT_EPISODES or np.ptp(numbers) < 1e-6 * max(1.0, float(np.abs(numbers).max())):
            continue
        result = spearmanr(np.arange(len(numbers)), numbers)
        if abs(result.statistic) > DRIFT_CORRELATION and result.pvalue < DRIFT_LEVEL / len(values):
            third = max(1, len(numbers) // 3)
            found.append(
                {
                    "name": name,
                    "correlation": float(result.statistic),
                    "first": float(numbers[:third].mean()),
                    "last": float(numbers[-third:].mean()),
                }
            )
    return sorted(found, key=lambda entry: -abs(entry["correlation"]))


def outliers(values: Sequence[float], smallest: float) -> np.ndarray:
    """Return ``(N,)`` signed deviations from the median in scaled median absolute deviations; 0 for few episodes.

    Args:
        values: one per episode.
        smallest: deviation that is never taken for less, so that nearly equal values have no outliers.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < OUTLIER_EPISODES:
        return np.zeros(len(numbers))
    apart = numbers - np.median(numbers)
    # 1.4826 makes it the standard deviation of a normal distribution.
    width = max(1.4826 * float(np.median(np.abs(apart))), smallest)
    result: np.ndarray = apart / width
    return result


def describe_starts(dataset: Dataset, starts: Sequence[Arrays]) -> list[dict[str, Any]]:
    """Return where the episodes began, one entry per movable thing, with a grid coverage.

    Objects of our own tasks are found by name in ``object_state``. Elsewhere the first two principal components of the
    first observation stand in for them.

    Args:
        dataset: says which task the episodes are of.
        starts: first rows of ``obs/object_state`` (or of the vectors) of every episode, by array name; at least one.

    Returns:
        ``name``, ``unit``, ``points`` (N, 2), ``occupied`` (share of an 8 x 8 grid over their box), ``expected`` (the
        same for as many uniform draws), ``repeated`` (starts within 1 mm of an earlier one; our own tasks only).
    """
    things: dict[str, tuple[str, np.ndarray]] = {}
    names = _object_state_names(dataset)
    if names and all(start.get("obs/object_state", np.zeros(0)).shape == (len(names),) for start in starts):
        states = np.stack([start["obs/object_state"] for start in starts]).astype(np.float64)
        for index, name in enumerate(names):
            if name.endswith("_x") and names[index + 1] == f"{name[:-2]}_y":
                points = states[:, index : index + 2]
                if np.ptp(points, axis=0).max() > 1e-4:
                    things[name[:-2]] = ("m", points)
    elif keys := [key for key in starts[0] if all(_alike(start.get(key), starts[0][key]) for start in starts)]:
        vectors = np.stack([np.concatenate([start[key].ravel() for key in keys]) for start in starts]).astype(
            np.float64
        )
        things["first observation"] = ("principal components", _principal(vectors))
    return [_coverage(name, unit, points) for name, (unit, points) in things.items()]


def _alike(first: np.ndarray | None, second: np.ndarray) -> bool:
    return first is not None and first.shape == second.shape


def _object_state_names(dataset: Dataset) -> tuple[str, ...]:
    from simtoreal.envs.task_file import parse_task

    if len(dataset.tasks) != 1:
        return ()
    try:
        return parse_task(dataset.task, source=str(dataset.path)).object_state_names
    except SimtorealError:
        return ()  # A task of somebody else: nothing is known about its objects.


def _principal(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(axis=0)
    spread = centred.std(axis=0)
    centred = centred[:, spread > 1e-9] / spread[spread > 1e-9]
    if min(centred.shape) < 2:
        return np.zeros((len(vectors), 2))
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    result: np.ndarray = centred @ axes[:2].T
    return result


def _coverage(name: str, unit: str, points: np.ndarray) -> dict[str, Any]:
    low, size = points.min(axis=0), np.maximum(np.ptp(points, axis=0), 1e-12)
    cells = np.minimum(((points - low) / size * COVERAGE_CELLS).astype(int), COVERAGE_CELLS - 1)
    total = COVERAGE_CELLS**2
    repeated = 0
    if unit == "m":
        repeated = len(points) - len({tuple(row) for row in np.round(points / 0.001).astype(int)})
    return {
        "name": name,
        "unit": unit,
        "points": points.tolist(),
        "box": [low.tolist(), (low + size).tolist()],
        "occupied": len({tuple(cell) for cell in cells}) / total,
        "expected": 1 - (1 - 1 / total) ** len(points),
        "repeated": repeated,
    }

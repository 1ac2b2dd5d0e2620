"""Comparison of imagined with real videos, frame by frame: pictures, positions, success, physics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from simtoreal.evaluation.bootstrap import curve_with_interval, mean_with_interval
from simtoreal.evaluation.statistics import posterior_interval
from simtoreal.world_models.classifier import shows_success
from simtoreal.world_models.clips import Clips
from simtoreal.world_models.positions import TCP, Positions
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.violations import ObjectEvidence, find_violations

# Equal pictures have no noise; a bound keeps means finite (an error of a tenth of a grey level).
LARGEST_PSNR_DB = 68.0
# An object took part in an episode if it moved further than this.
MOVED_M = 0.03


def against_horizon(clips: Clips, values: np.ndarray) -> dict[str, Any]:
    """Return a quantity ``(M,)`` of frames against how far ahead they were imagined.

    Returns:
        ``mean``, ``interval``, ``n``: over episodes, each the mean over its imagined frames; ``curve``: per control
        step from 1 on, see :func:`~simtoreal.evaluation.bootstrap.curve_with_interval`.
    """
    table = clips.table(values)[:, 1:]
    if not table.shape[1]:
        return {**mean_with_interval(np.zeros(0)), "curve": {"mean": [], "low": [], "high": [], "n": []}}
    counted = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        means = np.where(counted.any(1), np.nansum(table, 1) / counted.sum(1), np.nan)
    return {**mean_with_interval(means), "curve": curve_with_interval(table)}


def psnr_db(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio ``(M,)`` of pictures ``(M, V, H, W, 3)``, over all cameras."""
    parts = np.array_split(np.arange(len(first)), max(1, len(first) // 256))
    squared = [
        np.square(first[part].astype(np.float32) - second[part].astype(np.float32)).mean((1, 2, 3, 4)) for part in parts
    ]
    ratio = np.concatenate(squared) / 255.0**2
    return np.minimum(-10 * np.log10(np.maximum(ratio, 1e-12)), LARGEST_PSNR_DB)


def displacement(positions: Positions, real: Clips, seen: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return position errors against simulator truth, in metres.

    Args:
        positions: truth.
        real: real videos.
        seen: name -> ``(M, K, 3)`` what the probe sees in videos of the same episodes, e.g. ``imagined``, and ``floor``
            in the real ones.

    Returns:
        Thing -> every name of ``seen``, as :func:`against_horizon`, and for objects ``<name>_moved``: of the episodes
        in which the object really moved (None without any), and ``moved_episodes``, their number.
    """
    found = {}
    truth = positions.values[real.frames]
    for column, thing in enumerate(positions.names):
        errors = {name: np.linalg.norm(values[:, column] - truth[:, column], axis=-1) for name, values in seen.items()}
        entry = {name: against_horizon(real, values) for name, values in errors.items()}
        if thing != TCP:
            took_part = moved_episodes(real, truth[:, column])
            entry["moved_episodes"] = int(took_part.sum())
            inside = took_part[real.episode]
            for name, values in errors.items():
                moved = against_horizon(real, np.where(inside, values, np.nan)) if inside.any() else None
                entry[f"{name}_moved"] = moved
        found[thing] = entry
    return found


def moved_episodes(clips: Clips, place: np.ndarray) -> np.ndarray:
    """Return ``(E,)`` bool: what is at ``place`` ``(M, 3)`` really moved."""
    travelled = np.linalg.norm(place - place[clips.starts[clips.episode]], axis=-1)
    return np.nanmax(clips.table(travelled), 1) > MOVED_M


def proprio_error(columns: list[int], real: Clips, imagined: Clips) -> dict[str, Any] | None:
    """Return the distance in metres of the imagined to the real end effector as ``columns`` of proprio say it.

    None without such columns.
    """
    if not columns:
        return None
    return against_horizon(real, np.linalg.norm((imagined.proprio - real.proprio)[:, columns], axis=-1))


def confusion(data: VideoData, clips: Clips, threshold: float, consecutive: int) -> dict[str, Any]:
    """Return what the success classifier says, of frames and of episodes, against what really happened.

    An imagined episode may really end otherwise; the real outcome under the same actions is what it is compared with.
    """
    probability, labels = clips.success_probability, data.labels[clips.frames]
    # The first frame is real in all videos.
    judged = clips.step > 0
    frames = _table(probability[judged] >= threshold, labels[judged])
    said = np.array(
        [
            bool(shows_success(probability[start:end], threshold, consecutive)[-1])
            for start, end in zip(clips.starts, clips.ends, strict=True)
        ]
    )
    return {"frames": frames, "episodes": _table(said, data.success[clips.episodes])}


def _table(said: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    counts = {
        "true_positives": int((said & true).sum()), "false_positives": int((said & ~true).sum()),
        "false_negatives": int((~said & true).sum()), "true_negatives": int((~said & ~true).sum()),
    }  # fmt: skip
    rates = [said[true].mean() if true.any() else None, (~said[~true]).mean() if (~true).any() else None]
    known = [float(rate) for rate in rates if rate is not None]
    return {**counts, "balanced_accuracy": float(np.mean(known)) if len(known) == 2 else None}


def violation_rates(
    evidence: list[ObjectEvidence], videos: dict[str, tuple[Clips, np.ndarray]], probe_error_m: np.ndarray
) -> dict[str, Any]:
    """Return rule -> name of the videos -> share of episodes in which an object breaks the rule.

    Args:
        evidence: see :mod:`simtoreal.world_models.violations`.
        videos: name -> videos and ``(M, K, 3)`` positions that the probe sees.
        probe_error_m: ``(K,)`` median error of the probe on real frames.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, (clips, seen) in videos.items():
        for rule, broken in find_violations(clips, evidence, seen, probe_error_m).items():
            count, n = int(broken.any(1).sum()), len(broken)
            found.setdefault(rule, {})[name] = {
                "episodes": count, "n": n, "rate": count / n, "interval": list(posterior_interval(count, n)),
                "objects": {one.name: int(broken[:, index].sum()) for index, one in enumerate(evidence)},
                "rows": np.flatnonzero(broken.any(1)).tolist(),
            }  # fmt: skip
    return found

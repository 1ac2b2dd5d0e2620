"""How an arm moved in an episode: standing idle, at the limits of its actions, smoothly or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, open_episode
from simtoreal.data_collection.statistics import VectorStatistics
from simtoreal.envs.embodiment import TARGET_NAMES, Embodiment

# Slower than this part of its range per second, a dimension stands still (3 mm/s over 30 cm of workspace).
STILL_PER_S = 0.01
# An ``ee_delta`` command below this part of the limits is none (0.4 mm per step of the Panda).
NO_COMMAND = 0.02
# Values this close to a bound are at it.
AT_BOUND = 1e-3
# Spectral arc length (Balasubramanian et al. 2012, IEEE Trans. Biomed. Eng. 59(8)): cut-off and amplitude threshold.
SPECTRUM_HZ, SPECTRUM_THRESHOLD, PADDING = 10.0, 0.05, 4


@dataclass(frozen=True, kw_only=True)
class MotionScale:
    """Ranges that decide what counts as standing still in a dataset.

    Attributes:
        embodiment: of the dataset.
        keys: arrays that show the motion: ``obs/proprio``, or every vector observation where there is none.
        spans: array name (of ``keys`` and ``actions``) -> ``(D,)`` range between the 2nd and 98th percentile, or of all
            values where that is nothing.
        low, high: ``(A,)`` smallest and largest action of the dataset.
    """

    embodiment: Embodiment
    keys: tuple[str, ...]
    spans: dict[str, np.ndarray]
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, episodes: Iterable[EpisodeInfo] | None = None) -> MotionScale:
        """Measure the ranges over ``episodes`` (default: all) of a dataset with at least one episode.

        Raises:
            DatasetError: an episode is damaged.
        """
        chosen = list(dataset.episodes if episodes is None else episodes)
        keys = motion_keys(chosen)
        parts: dict[str, list[VectorStatistics]] = {name: [] for name in (*keys, "actions")}
        for episode in chosen:
            for name, rows in dataset.read(episode, parts).items():
                parts[name].append(VectorStatistics.of(rows))
        merged = {name: VectorStatistics.merge(values) for name, values in parts.items()}
        spans = {}
        for name, values in merged.items():
            span, full = values.quantile(0.98) - values.quantile(0.02), values.maximum - values.minimum
            spans[name] = np.where(span > 1e-9, span, full)
        actions = merged["actions"]
        return cls(embodiment=dataset.embodiment, keys=keys, spans=spans, low=actions.minimum, high=actions.maximum)

    @property
    def is_delta(self) -> bool:
        """Whether an action of zero means to stay."""
        return self.embodiment.action.mode == "ee_delta"

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and largest possible action ``(A,)``: those of the data where nothing else is known."""
        if self.is_delta:
            return np.full_like(self.low, -1.0), np.full_like(self.high, 1.0)
        return self.low, self.high


def motion_keys(episodes: Iterable[EpisodeInfo]) -> tuple[str, ...]:
    """Arrays that show how the robot moves: proprio, or every vector observation that all episodes have alike.

    Raises:
        DatasetError: an episode is damaged.
    """
    shared: set[tuple[str, int]] | None = None
    for episode in episodes:
        with open_episode(Path(str(episode.path))) as file:
            vectors = {
                (f"obs/{key}", array.shape[1])
                for key, array in file["obs"].items()
                if array.ndim == 2 and array.shape[1] and array.dtype.kind == "f"
            }
        shared = vectors if shared is None else shared & vectors
    names = sorted(name for name, _ in shared or ())
    return ("obs/proprio",) if "obs/proprio" in names else tuple(names)


def idle_steps(arrays: Arrays, scale: MotionScale) -> np.ndarray:
    """Return ``(T,)`` bool: steps in which nothing was commanded and the robot stood still.

    With ``ee_delta``, nothing is commanded when the motion is about zero and the gripper's command stays the same;
    with other modes, when the action does not change.
    """
    actions, rate = arrays["actions"].astype(np.float64), scale.embodiment.control_hz
    steps = len(actions)
    change = np.zeros_like(actions)
    change[1:] = np.abs(np.diff(actions, axis=0))
    if scale.is_delta:
        commanded = (np.abs(actions[:, :-1]) > NO_COMMAND).any(axis=1)
        commanded |= np.concatenate([[False], (actions[1:, -1] > 0) != (actions[:-1, -1] > 0)])
    else:
        commanded = _moved(change, scale.spans["actions"], rate)
    moving = np.zeros(steps, dtype=bool)
    for name in scale.keys:
        step = np.abs(np.diff(arrays[name].astype(np.float64), axis=0))
        if len(step):
            moving |= _moved(np.concatenate([step, step[-1:]]), scale.spans[name], rate)
    return ~commanded & ~moving


def _moved(change: np.ndarray, span: np.ndarray, rate: float) -> np.ndarray:
    used = span > 1e-9
    return np.asarray((change[:, used] * rate > STILL_PER_S * span[used]).any(axis=1))


def saturation(actions: np.ndarray, scale: MotionScale) -> np.ndarray:
    """Return the share of steps per dimension ``(A,)`` in which the action is at a bound."""
    low, high = scale.bounds()
    width = high - low
    at = (actions <= low + AT_BOUND * width) | (actions >= high - AT_BOUND * width)
    return np.where(width > 1e-9, at.mean(axis=0), 0.0)


def positions(arrays: Arrays, embodiment: Embodiment) -> dict[str, np.ndarray]:
    """Return the paths ``(T, 3)`` in metres that an episode holds: of the ``tcp`` and of its ``target``."""
    found = {}
    names = embodiment.proprio.names
    if {"tcp_x", "tcp_y", "tcp_z"} <= set(names) and "obs/proprio" in arrays:
        found["tcp"] = arrays["obs/proprio"][:, [names.index(f"tcp_{axis}") for axis in "xyz"]].astype(np.float64)
    if "step/target" in arrays and arrays["step/target"].shape[1:] == (len(TARGET_NAMES),):
        found["target"] = arrays["step/target"][:, :3].astype(np.float64)
    return found


def root_mean_square_jerk(path: np.ndarray, rate_hz: float) -> float:
    """Root mean square of the third derivative of a path ``(T, D)``, in its unit per s³; 0 for fewer than 4 steps."""
    if len(path) < 4:
        return 0.0
    jerk = np.diff(path, n=3, axis=0) * rate_hz**3
    return float(np.sqrt((jerk**2).sum(axis=1).mean()))


def spectral_arc_length(path: np.ndarray, rate_hz: float) -> float | None:
    """Smoothness of the speed along a path ``(T, D)``: 0 is ideal, more negative is jerkier; None without motion.

    The negative length of the normalised amplitude spectrum up to the cut-off, which unlike jerk does not depend on
    duration and amplitude.
    """
    speed = np.linalg.norm(np.diff(path, axis=0), axis=1) * rate_hz
    if len(speed) < 4 or speed.max() < 1e-9:
        return None
    size = int(2 ** (np.ceil(np.log2(len(speed))) + PADDING))
    frequency = np.arange(size) * rate_hz / size
    amplitude = np.abs(np.fft.fft(speed, size))
    amplitude /= amplitude.max()
    inside = frequency <= min(SPECTRUM_HZ, rate_hz / 2)
    frequency, amplitude = frequency[inside], amplitude[inside]
    above = np.flatnonzero(amplitude >= SPECTRUM_THRESHOLD)
    frequency, amplitude = frequency[above[0] : above[-1] + 1], amplitude[above[0] : above[-1] + 1]
    if len(frequency) < 2:
        return 0.0
    width = frequency[-1] - frequency[0]
    return float(-np.hypot(np.diff(frequency) / width, np.diff(amplitude)).sum())


def describe_motion(arrays: Arrays, scale: MotionScale) -> dict[str, Any]:
    """Return idle share, saturation, jerk and smoothness of an episode, JSON-compatible."""
    rate = scale.embodiment.control_hz
    idle = idle_steps(arrays, scale)
    moving = np.flatnonzero(~idle)
    span = scale.spans["actions"]
    relative = arrays["actions"].astype(np.float64)[:, span > 1e-9] / span[span > 1e-9]
    result: dict[str, Any] = {
        "idle_share": float(idle.mean()),
        "idle_start_steps": int(moving[0]) if len(moving) else len(idle),
        "idle_end_steps": int(len(idle) - 1 - moving[-1]) if len(moving) else 0,
        "saturation": saturation(arrays["actions"], scale).tolist(),
        # Of the commands, in ranges per step³: comparable between any two episodes of one dataset.
        "action_jerk": root_mean_square_jerk(relative, 1.0),
    }
    for name, path in positions(arrays, scale.embodiment).items():
        result[f"{name}_jerk_m_s3"] = root_mean_square_jerk(path, rate)
        result[f"{name}_smoothness"] = spectral_arc_length(path, rate)
        result[f"{name}_path_m"] = float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
    return result

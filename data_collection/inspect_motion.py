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

# Slower than this, something stands still: metres, radians (or entries of a rotation matrix), and shares of the opening
# of the gripper or of the range of a dimension whose unit is not known, per second.
STILL_M_S, STILL_RAD_S, STILL_SHARE_S = 0.002, 0.01, 0.01
# Speeds are slopes of a line through this much time: long enough to tell 1 cm/s from noise of 1 mm at 20 Hz.
SPEED_WINDOW_S = 0.8
# What is within this many standard deviations of sensor noise is not motion. One wrong step ends a rest: few may be.
NOISE_DEVIATIONS = 5.0
# What varies by less of its magnitude is float32 that was rounded.
NEGLIGIBLE_SPAN = 1e-6
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
            values where that is nothing; 0 where it is negligible.
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
            least = NEGLIGIBLE_SPAN * np.maximum(np.abs(values.minimum), np.abs(values.maximum))
            spans[name] = np.select([span > least, full > least], [span, full], 0.0)
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
    with other modes, when the action does not change. Speeds are those over ``SPEED_WINDOW_S``: steps within half of it
    before and after a motion are not idle.
    """
    return ~_commanded(arrays, scale) & ~_moving(*_poses(arrays, scale), scale.embodiment.control_hz)


def certain_motion(arrays: Arrays, scale: MotionScale) -> np.ndarray:
    """Return the pose of the robot ``(T, D)``, so scaled that steps that differ by 1 are certainly apart.

    That is as far as something goes in a second when it just does not stand still, or further than noise reaches. Where
    no vectors show it, the number of commands before a step stands in for the pose.
    """
    poses, still = _poses(arrays, scale)
    if not poses.shape[1]:
        commanded = _commanded(arrays, scale)
        return (np.cumsum(commanded) - commanded)[:, None].astype(np.float64)
    # Two steps differ by the noise of both.
    scaled: np.ndarray = poses / np.maximum(still, NOISE_DEVIATIONS * np.sqrt(2) * _noise(poses))
    return scaled


def _commanded(arrays: Arrays, scale: MotionScale) -> np.ndarray:
    actions = arrays["actions"].astype(np.float64)
    if scale.is_delta:
        closes = actions[:, -1] > 0
        changes = np.diff(closes, prepend=closes[:1])
        return np.asarray((np.abs(actions[:, :-1]) > NO_COMMAND).any(axis=1) | changes)
    span = scale.spans["actions"]
    return _moving(actions[:, span > 0], STILL_SHARE_S * span[span > 0], scale.embodiment.control_hz)


def _poses(arrays: Arrays, scale: MotionScale) -> tuple[np.ndarray, np.ndarray]:
    """Return what shows the motion ``(T, D)`` and the speed ``(D,)`` per second below which it stands still.

    That is the hand, where it is named: joints may creep while it rests, since an arm of seven can.
    """
    proprio = scale.embodiment.proprio
    known = dict(zip(proprio.names, proprio.units, strict=True))
    columns, still = [np.zeros((len(arrays["actions"]), 0))], []
    for key in scale.keys:
        spans = scale.spans[key]
        own = key == "obs/proprio" and len(known) == len(spans)
        names = list(known) if own else [""] * len(spans)
        hand = {"tcp_x", "tcp_y", "tcp_z"} <= set(names)
        for index, name in enumerate(names):
            if spans[index] > 0 and (not hand or name.startswith("tcp_") or name == "gripper_opening"):
                columns.append(arrays[key][:, index : index + 1].astype(np.float64))
                still.append(_still_speed(name, known.get(name, ""), float(spans[index])))
    return np.concatenate(columns, axis=1), np.array(still)


def _still_speed(name: str, unit: str, span: float) -> float:
    if unit == "m":
        return STILL_M_S
    if unit == "rad" or name.startswith("tcp_r"):
        return STILL_RAD_S
    return STILL_SHARE_S * (1.0 if name == "gripper_opening" else span)


def _moving(values: np.ndarray, still: np.ndarray, rate: float) -> np.ndarray:
    """Return ``(T,)`` bool: steps in which a dimension of ``values`` ``(T, D)`` is faster than ``still`` and noise."""
    from scipy.signal import savgol_filter

    steps = len(values)
    window = min(2 * max(round(SPEED_WINDOW_S * rate / 2), 2) + 1, steps - (steps + 1) % 2)
    if window < 3 or not values.shape[1]:
        return np.zeros(steps, dtype=bool)
    speed = np.abs(savgol_filter(values, window, polyorder=1, deriv=1, delta=1 / rate, axis=0))
    # Standard deviation of the slope of a line through that many values with noise of 1.
    slope_noise = rate * np.sqrt(12 / (window * (window**2 - 1)))
    return np.asarray((speed > np.maximum(still, NOISE_DEVIATIONS * slope_noise * _noise(values))).any(axis=1))


def _noise(values: np.ndarray) -> np.ndarray:
    """Estimate the standard deviation ``(D,)`` of white noise on smooth signals ``(T, D)``.

    By third differences, which hardly contain the motion, and their median, for the moments where they do.
    """
    if len(values) < 4:
        return np.zeros(values.shape[1])
    # Third differences of unit noise have the variance 1 + 9 + 9 + 1; half of all normal values are within 0.6745.
    median: np.ndarray = np.median(np.abs(np.diff(values, n=3, axis=0)), axis=0)
    return median / (np.sqrt(20) * 0.6745)


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

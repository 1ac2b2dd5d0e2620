"""When and what the sensors of an episode delivered: rate, gaps, skew, delay and images that stood still."""

from __future__ import annotations

from typing import Any

import numpy as np

from simtoreal.data_collection.episode import Arrays, EpisodeInfo

# A step that comes later than this many periods after the one before is a gap: at least one was missed.
GAP_PERIODS = 1.5


def describe_timing(arrays: Arrays, period_s: float) -> dict[str, Any] | None:
    """Return rate, jitter and gaps from ``step/timestamp_ns``, or None for fewer than two stamps.

    Args:
        arrays: of an episode.
        period_s: of the control steps, as the embodiment promises.
    """
    stamps = arrays.get("step/timestamp_ns")
    if stamps is None or len(stamps) < 2:
        return None
    intervals_ms: np.ndarray = np.diff(stamps.astype(np.int64)) * 1e-6
    mean = float(intervals_ms.mean())
    gaps = np.flatnonzero(intervals_ms > GAP_PERIODS * 1000 * period_s)
    return {
        "rate_hz": 1000.0 / mean if mean > 0 else 0.0,
        "jitter_ms": float(np.abs(intervals_ms - 1000 * period_s).max()),
        "gaps": len(gaps),
        "longest_interval_ms": float(intervals_ms.max()),
        "gap_steps": [int(step) for step in gaps[:20]],
    }


def describe_stamps(arrays: Arrays, info: EpisodeInfo) -> dict[str, Any] | None:
    """Return skew between sensors, delay to arrival and repeated measurements, or None if no sensor stamped anything.

    Skew is the spread of the capture stamps within a step. A measurement is repeated when a step shows the same one as
    the step before.
    """
    captured = arrays.get("step/capture_ns")
    names = info.columns.get("capture_ns", ())
    if captured is None or captured.ndim != 2 or not captured.shape[1] or len(names) != captured.shape[1]:
        return None
    captured = captured.astype(np.int64)
    skew_ms = (captured.max(axis=1) - captured.min(axis=1)) * 1e-6
    result: dict[str, Any] = {
        "skew_ms": {"median": float(np.median(skew_ms)), "max": float(skew_ms.max())},
        "sensors": {},
    }
    received = arrays.get("step/receive_ns")
    for column, name in enumerate(names):
        repeated = np.diff(captured[:, column]) <= 0
        entry = {"repeated_share": float(repeated.mean()) if len(repeated) else 0.0}
        if received is not None and received.shape == captured.shape:
            delay_ms = (received[:, column].astype(np.int64) - captured[:, column]) * 1e-6
            entry |= {"delay_median_ms": float(np.median(delay_ms)), "delay_max_ms": float(delay_ms.max())}
        result["sensors"][name] = entry
    return result


def describe_images(images: np.ndarray, poses: np.ndarray) -> dict[str, Any]:
    """Return how often a camera showed exactly the image before, overall and while the robot moved.

    A simulated camera may do so at rest; a real one never does, because of its noise.

    Args:
        images: uint8 ``(T, H, W, 3)``.
        poses: ``(T, D)`` of the robot, see :func:`~simtoreal.data_collection.inspect_motion.certain_motion`; a run of
            equal frames is *frozen* when one of them was taken 1 or more away from where the first was.
    """
    same = np.zeros(len(images), dtype=bool)
    for step in range(1, len(images)):
        same[step] = np.array_equal(images[step], images[step - 1])
    frozen = np.zeros(len(images), dtype=bool)
    for first, end in _runs(same):
        frozen[first:end] = (np.abs(poses[first:end] - poses[first - 1]) >= 1).any()
    return {
        "identical_share": float(same.mean()),
        "frozen_share": float(frozen.mean()),
        "longest_identical_steps": _longest_run(same),
        "longest_frozen_steps": _longest_run(frozen),
        "brightness": float(images[0].mean()),
    }


def _runs(flags: np.ndarray) -> np.ndarray:
    """First step and the one after the last of every run of set flags, ``(N, 2)``."""
    return np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))).reshape(-1, 2)


def _longest_run(flags: np.ndarray) -> int:
    return int(np.diff(_runs(flags)).max(initial=0))


def describe_scene_motion(arrays: Arrays, info: EpisodeInfo, period_s: float) -> dict[str, Any] | None:
    """Return the dose of MOVE that an episode got, or None if its scene stood still.

    Args:
        arrays: with ``step/scene_motion``; its columns say what they hold by their unit.
        info: names the columns.
        period_s: of the control steps.

    Returns:
        ``speed_factor`` (that of the object, if every thing has its own); per moving thing ``moving_share`` (of the
        steps), ``mean_speed_m_s`` (while it moved), ``distance_m``, ``turn_deg``; ``camera``: largest change of every
        camera parameter.
    """
    rows, names = arrays.get("step/scene_motion"), info.columns.get("scene_motion", ())
    if rows is None or rows.ndim != 2 or len(names) != rows.shape[1]:
        return None
    columns = {name: rows[:, index] for index, name in enumerate(names)}
    things: dict[str, dict[str, np.ndarray]] = {}
    for name, values in columns.items():
        for axis in "xyz":
            if name.endswith(f"_v{axis}_m_s"):
                things.setdefault(name.removesuffix(f"_v{axis}_m_s"), {})[axis] = values
        if name.endswith("_turn_rad_s"):
            things.setdefault(name.removesuffix("_turn_rad_s"), {})["turn"] = values
    result: dict[str, Any] = {"things": {}, "camera": {}}
    if "speed_factor_object" in columns:
        result["speed_factor"] = float(columns["speed_factor_object"][0])
    for thing, parts in things.items():
        still = np.zeros(len(rows))
        speed = np.sqrt(sum(np.square(parts.get(axis, still)) for axis in "xyz"))
        turn = np.abs(parts.get("turn", still))
        moving = speed > 1e-9
        result["things"][thing] = {
            "moving_share": float((moving | (turn > 1e-9)).mean()),
            "mean_speed_m_s": float(speed[moving].mean()) if moving.any() else 0.0,
            "distance_m": float(speed.sum() * period_s),
            "turn_deg": float(np.degrees(turn.sum() * period_s)),
        }
    for name, values in columns.items():
        if name.startswith("camera_"):
            result["camera"][name.removeprefix("camera_")] = float(np.ptp(values))
    return result

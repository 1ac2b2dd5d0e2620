"""From targets every 50 ms to a smooth pose at every tick of the gate."""

from __future__ import annotations

import math

import numpy as np

# A target that arrives this late after the previous one has been reached still belongs to the same motion.
GAP_NS = 25_000_000


class TargetInterpolator:
    """Timed targets, interpolated linearly and averaged over a sliding window.

    Linear interpolation alone would ask for infinite acceleration at every target, and for an overshoot wherever
    the motion ends suddenly. Its average over the last ``smoothing_s`` seconds (with one control period: a
    quadratic B-spline through the targets) changes its velocity gradually and never leaves their convex hull.
    The last target is held.

    Args:
        dt: seconds between ticks.
        smoothing_s: length of the window.
    """

    def __init__(self, dt: float, smoothing_s: float) -> None:
        self._window = np.zeros((max(1, round(smoothing_s / dt)), 8))
        self._cursor = 0
        self._dt_ns = round(dt * 1e9)
        self.reset(np.zeros(3), np.array([1.0, 0.0, 0.0, 0.0]), 0.0, 0)

    def reset(self, position: np.ndarray, quaternion: np.ndarray, opening: float, now_ns: int) -> None:
        """Rest at a pose ``(3,)`` m, ``(4,)`` wxyz and gripper opening."""
        value = np.concatenate([position, quaternion, [opening]])
        self._window[:] = value
        self._knots: list[tuple[int, np.ndarray]] = [(now_ns, value)]

    def add(self, position: np.ndarray, quaternion: np.ndarray, opening: float, at_ns: int, now_ns: int) -> None:
        """Append a target to be reached at ``at_ns``, later than the targets before it.

        One for the past counts as due now; the limiter behind makes up for it.
        """
        at_ns = max(at_ns, now_ns)
        last_ns, last = self._knots[-1]
        # The same rotation has two quaternions; averages need neighbouring ones.
        near = quaternion if float(quaternion @ last[3:7]) >= 0 else -quaternion
        if at_ns <= last_ns:
            self._knots.pop()  # two for the same moment: the newer one counts
        elif now_ns - last_ns > GAP_NS:
            # The last target was reached a while ago: the motion to the new one begins now, not back then.
            self._knots.append((now_ns - self._dt_ns, last))
        self._knots.append((at_ns, np.concatenate([position, near, [opening]])))

    def sample(self, now_ns: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Advance one tick: desired position, unit quaternion and gripper opening at ``now_ns``.

        The opening is that of the newest target: a gripper is not interpolated.
        """
        while len(self._knots) > 1 and self._knots[1][0] <= now_ns:
            self._knots.pop(0)
        start_ns, start = self._knots[0]
        value = start
        if len(self._knots) > 1 and now_ns > start_ns:
            end_ns, end = self._knots[1]
            share = (now_ns - start_ns) / (end_ns - start_ns)  # knots up to now were dropped: end is later
            value = start + share * (end - start)
        self._window[self._cursor] = value
        self._cursor = (self._cursor + 1) % len(self._window)
        mean = value if (self._window == value).all() else self._window.mean(axis=0)
        quaternion = mean[3:7] / math.sqrt(float(mean[3:7] @ mean[3:7]))
        return mean[:3].copy(), quaternion, float(self._knots[-1][1][7])

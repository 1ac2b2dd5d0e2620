"""Streams of stamped messages, brought onto the grid of the control rate."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.errors import DatasetError
from simtoreal.robot.stamp_clock import CLOCK_DRIFT, CLOCK_STEP_NS


@dataclass
class Track:
    """What one topic said, in the order of arrival.

    Attributes:
        name: topic, for messages.
        stamps_ns: capture or publication times by the sender's clock.
        arrived_ns: times of arrival by the recorder's clock.
        values: arrays or messages.
    """

    name: str
    stamps_ns: list[int] = field(default_factory=list)
    arrived_ns: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    _set_back_ns: int = field(default=0, init=False)

    def add(self, stamp_ns: int, arrived_ns: int, value: Any) -> None:
        """Append a value; stamps that do not advance are dropped, unless the sender's clock was set back.

        As for a running robot (:class:`~simtoreal.robot.stamp_clock.StampClock`), messages of one sender do not
        overtake each other: a stamp that goes back, is none of those seen, and comes with a larger delay is that of a
        clock that was set. Stamps then go on as if it had not been.
        """
        stamp_ns += self._set_back_ns
        if self.stamps_ns and stamp_ns <= self.stamps_ns[-1]:
            grown = (arrived_ns - stamp_ns) - (self.arrived_ns[-1] - self.stamps_ns[-1])
            if grown <= CLOCK_STEP_NS or self._knows(stamp_ns):
                return
            self._set_back_ns += grown
            stamp_ns += grown
            if stamp_ns <= self.stamps_ns[-1]:
                return
        self.stamps_ns.append(stamp_ns)
        self.arrived_ns.append(arrived_ns)
        self.values.append(value)

    def _knows(self, stamp_ns: int) -> bool:
        place = bisect.bisect_left(self.stamps_ns, stamp_ns)
        return place < len(self.stamps_ns) and self.stamps_ns[place] == stamp_ns

    def is_after(self, arrived_ns: int) -> bool:
        """Whether values are of later than the next arrival, because the recorder's own clock was set back."""
        return bool(self.arrived_ns) and self.arrived_ns[-1] > arrived_ns + CLOCK_STEP_NS

    def forget(self) -> None:
        """Drop everything."""
        self.stamps_ns.clear()
        self.arrived_ns.clear()
        self.values.clear()
        self._set_back_ns = 0

    def forget_before(self, arrived_ns: int) -> None:
        """Drop what arrived before, except the newest value."""
        keep = min(int(np.searchsorted(self.arrived_ns, arrived_ns)), max(0, len(self.values) - 1))
        del self.stamps_ns[:keep], self.arrived_ns[:keep], self.values[:keep]

    def offsets(self) -> np.ndarray:
        """Return what the stamps are before the recorder's clock ``(N,)``, in nanoseconds.

        As on a running robot (:class:`~simtoreal.robot.stamp_clock.StampClock`), the least delay until then counts as
        zero: a clock that is behind and a constant delay look the same, and taking the one for the other would import
        what was not known yet. Arrivals that take less than half as long as what was measured are those in a file that
        was written later; then one offset holds for all.
        """
        arrived, stamps = np.array(self.arrived_ns, dtype=np.int64), np.array(self.stamps_ns, dtype=np.int64)
        delays = arrived - stamps
        if len(stamps) and 2 * (arrived[-1] - arrived[0]) < stamps[-1] - stamps[0]:
            return np.full_like(delays, delays.min())
        drift = (CLOCK_DRIFT * (arrived - arrived[:1])).astype(np.int64)
        return np.minimum.accumulate(delays - drift) + drift

    def times(self) -> np.ndarray:
        """Return the stamps ``(N,)`` int64 in the recorder's clock."""
        # Offsets alone never bring times out of order, a recorder's clock that is set may.
        return np.maximum.accumulate(np.array(self.stamps_ns, dtype=np.int64) + self.offsets())

    def ages_s(self, ticks_ns: np.ndarray) -> np.ndarray:
        """Return, per tick, the seconds since the newest value, or until the first one.

        Raises:
            DatasetError: there is none.
        """
        times = self.times()
        if not len(times):
            raise DatasetError(f"nothing was recorded on {self.name}")
        rows = np.maximum(np.searchsorted(times, ticks_ns, side="right") - 1, 0)
        return np.asarray(np.abs(ticks_ns - times[rows]) * 1e-9)

    def newest(self, ticks_ns: np.ndarray, max_age_s: float) -> list[Any]:
        """Return, per tick, the newest value stamped at or before it.

        Raises:
            DatasetError: there is none, or it is older than ``max_age_s`` seconds.
        """
        times = self.times()
        rows = np.searchsorted(times, ticks_ns, side="right") - 1
        if rows.min(initial=0) < 0:
            raise DatasetError(f"{self.name} is silent at the beginning")
        self._check_ages(ticks_ns - times[rows], max_age_s)
        return [self.values[row] for row in rows]

    def interpolate(self, ticks_ns: np.ndarray, max_age_s: float, max_gap_s: float) -> np.ndarray:
        """Return the values, arrays ``(D,)``, interpolated linearly at the ticks: ``(len(ticks), D)`` float64.

        Between values further apart than ``max_gap_s`` seconds nothing is known, so the older one is held. Before the
        first and after the last stamp the nearest value is held.

        Raises:
            DatasetError: there is none, or what is used is further than ``max_age_s`` seconds from a tick.
        """
        times = self.times()
        if not len(times):
            raise DatasetError(f"nothing was recorded on {self.name}")
        after = np.clip(np.searchsorted(times, ticks_ns), 0, len(times) - 1)
        before = np.where(times[after] > ticks_ns, np.maximum(after - 1, 0), after)
        gap = (times[after] - times[before]) * 1e-9 > max_gap_s
        after = np.where(gap, before, after)
        nearest = np.minimum(np.abs(times[after] - ticks_ns), np.abs(times[before] - ticks_ns))
        self._check_ages(nearest, max_age_s)
        values = np.stack(self.values).astype(np.float64)
        span = times[after] - times[before]
        share = np.where(span > 0, (ticks_ns - times[before]) / np.maximum(span, 1), 0.0)[:, None]
        return values[before] + share * (values[after] - values[before])

    def _check_ages(self, ages_ns: np.ndarray, max_age_s: float) -> None:
        oldest_s = float(ages_ns.max(initial=0)) * 1e-9
        if oldest_s > max_age_s:
            raise DatasetError(f"{self.name} is silent for {oldest_s:.2f} s (at most {max_age_s:g} s)")


def normalized_pose(pose: np.ndarray) -> np.ndarray:
    """Return rows of position (3) and interpolated quaternion (4, wxyz) as position and 6-D rotation, ``(N, 9)``.

    Linear interpolation of quaternions a few milliseconds apart differs from the spherical one by less than 1e-6.
    """
    quaternion = pose[:, 3:] / np.linalg.norm(pose[:, 3:], axis=1, keepdims=True)
    return np.concatenate([pose[:, :3], rotation.to_6d(quaternion)], axis=1)

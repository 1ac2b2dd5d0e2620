"""How fresh and how complete the sensors of a recording are, from the stamps that a robot reports with every step.

All times are nanoseconds of this computer's monotonic clock:

* *observation*: ``info["timestamp_ns"]``, when the inputs of an observation were read.
* *capture*: ``info["capture_ns"]``, when a sensor measured what the observation shows.
* *receive*: ``info["receive_ns"]``, when that arrived in this process.

A robot that holds repeats its last observation; the stamps repeat with it, so that an old frame is never made new.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from simtoreal.data_collection.episode import EpisodeInfo
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.rollout import EpisodeResult, Listener, Observation, Step

# Gaps from which a sensor's own period is estimated.
_PERIOD_GAPS = 40


class SensorTrack:
    """The sensors of one episode.

    Args:
        control_period_s: of the environment.
    """

    def __init__(self, control_period_s: float) -> None:
        self._control_ns = round(control_period_s * 1e9)
        self._sensors: dict[str, _Sensor] = {}

    def add(self, info: dict[str, Any]) -> None:
        """Take the stamps of one observation.

        Args:
            info: entries of one environment (no leading axis); without ``capture_ns`` nothing happens, as in
                simulation, where every image is of the very moment.
        """
        captured = info.get("capture_ns")
        if not captured:
            return
        observed, newest = int(info["timestamp_ns"]), max(int(value) for value in captured.values())
        received, dropped = info.get("received_frames", {}), info.get("dropped_frames", {})
        for name, capture in captured.items():
            sensor = self._sensors.get(name) or _Sensor(self._control_ns)
            sensor.add(observed, newest, int(capture), int(info["receive_ns"][name]))
            if name in received:
                sensor.count(int(received[name]), int(dropped[name]))
            # Only now: displays read from other threads, and a sensor without a measurement has no state.
            self._sensors[name] = sensor

    @property
    def sensors(self) -> dict[str, dict[str, Any]]:
        """Newest state by sensor: ``age_ms``, ``period_ms``, ``late`` (older than a period), counts so far.

        Safe to read from any thread.
        """
        return {name: sensor.newest() for name, sensor in list(self._sensors.items())}

    def summary(self) -> dict[str, dict[str, Any]]:
        """By sensor, JSON-compatible, as stored in ``EpisodeInfo.extra["sensors"]``.

        ``age_ms``: observation minus capture (median, p99, max). ``skew_ms``: newest capture of any sensor in the same
        observation minus this one's (median, max). ``delay_ms``: receive minus capture (median, max). ``period_ms``:
        of the frames used. ``late``: observations in which the frame was older than a period of the sensor or of the
        control, whichever is longer. ``repeated``: observations that show the same frame as the one before.
        ``received``, ``dropped``: frames that arrived, and that are missing between them by their stamps, since the
        first observation; a sensor that does not report them is counted by the frames used.
        """
        return {name: sensor.summary() for name, sensor in self._sensors.items()}


class _Sensor:
    def __init__(self, control_ns: int) -> None:
        self._control_ns = control_ns
        self._ages: list[int] = []
        self._skews: list[int] = []
        self._delays: list[int] = []
        self._gaps: list[int] = []
        self._capture: int | None = None
        self._used = self._late = self._repeated = 0
        self._first: tuple[int, int] | None = None
        self._received = self._dropped = 0

    def add(self, observed: int, newest: int, capture: int, receive: int) -> None:
        self._ages.append(observed - capture)
        self._skews.append(newest - capture)
        self._delays.append(receive - capture)
        if capture == self._capture:
            self._repeated += 1
        else:
            self._used += 1
            if self._capture is not None:
                self._gaps.append(capture - self._capture)
        self._capture = capture
        self._late += self._ages[-1] > self._period_ns()

    def count(self, received: int, dropped: int) -> None:
        """Take the counts of the robot, which go on from episode to episode and begin before a take does."""
        self._first = self._first or (received, dropped)
        self._received, self._dropped = received - self._first[0], dropped - self._first[1]

    def _period_ns(self) -> int:
        """Own period by the frames used, which cannot be shorter than the control's."""
        gaps = sorted(self._gaps[-_PERIOD_GAPS:])
        return max(self._control_ns, gaps[len(gaps) // 2] if gaps else 0)

    def _counts(self) -> dict[str, int]:
        if self._first is not None:
            return {"received": self._received, "dropped": self._dropped}
        period = self._period_ns()
        return {"received": self._used, "dropped": sum(max(0, round(gap / period) - 1) for gap in self._gaps)}

    def newest(self) -> dict[str, Any]:
        age, period = self._ages[-1], self._period_ns()
        return {
            "age_ms": age * 1e-6, "period_ms": period * 1e-6, "late": age > period,
            "late_steps": self._late, "repeated": self._repeated, **self._counts(),
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        ages, skews, delays = (np.array(values) * 1e-6 for values in (self._ages, self._skews, self._delays))
        return {
            "age_ms": {
                "median": float(np.median(ages)), "p99": float(np.percentile(ages, 99)), "max": float(ages.max())
            },
            "skew_ms": {"median": float(np.median(skews)), "max": float(skews.max())},
            "delay_ms": {"median": float(np.median(delays)), "max": float(delays.max())},
            "period_ms": self._period_ns() * 1e-6,
            "late": self._late,
            "repeated": self._repeated,
            **self._counts(),
        }  # fmt: skip


class SensorHealth(Listener):
    """Follows the sensors of the first environment, also while nothing is recorded.

    Attributes:
        track: of the running episode.
    """

    def __init__(self, control_period_s: float) -> None:
        self._period_s = control_period_s
        self.track = SensorTrack(control_period_s)

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        if slot == 0:
            self.track = SensorTrack(self._period_s)
            self.track.add(info)

    def on_step(self, step: Step) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        if len(step.slots) and step.slots[0] == 0:
            self.track.add(one_row(step.info, 0))

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`; the last state stays readable until the next reset."""

    @property
    def snapshot(self) -> dict[str, dict[str, Any]]:
        """See :attr:`SensorTrack.sensors`."""
        return self.track.sensors


def over_episodes(episodes: Iterable[EpisodeInfo]) -> dict[str, dict[str, Any]]:
    """Join ``extra["sensors"]`` of episodes: the largest of every time, the sum of every count, by sensor.

    Episodes without it (simulation, imported data) are left out.

    Raises:
        DatasetError: what an episode holds there is not what a recorder writes.
    """
    joined: dict[str, dict[str, Any]] = {}
    for episode in episodes:
        try:
            for name, sensor in episode.extra.get("sensors", {}).items():
                times = {
                    "age_median_ms": sensor["age_ms"]["median"], "age_p99_ms": sensor["age_ms"]["p99"],
                    "age_max_ms": sensor["age_ms"]["max"], "skew_max_ms": sensor["skew_ms"]["max"],
                }  # fmt: skip
                counts = {key: int(sensor[key]) for key in ("received", "dropped", "repeated", "late")}
                row = joined.setdefault(name, {"episodes": 0, **dict.fromkeys(times, 0.0), **dict.fromkeys(counts, 0)})
                row["episodes"] += 1
                row.update({key: max(row[key], float(value)) for key, value in times.items()})
                row.update({key: row[key] + value for key, value in counts.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{episode.path}: extra 'sensors' is not what a recorder writes ({error!r}). Record it again, or "
                "import the dataset without it."
            ) from error
    return joined


_STAMPS = ("timestamp_ns", "capture_ns", "receive_ns", "received_frames", "dropped_frames")


def one_row(info: dict[str, Any], row: int) -> dict[str, Any]:
    """The stamps of one environment in a step's ``info``."""
    taken = {name: info[name] for name in _STAMPS if name in info}
    return {
        name: {key: item[row] for key, item in value.items()} if isinstance(value, dict) else value[row]
        for name, value in taken.items()
    }

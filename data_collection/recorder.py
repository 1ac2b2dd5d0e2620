"""Turns what happens in a rollout into episodes of a dataset."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simtoreal.data_collection.episode import ABORTED, Arrays, EpisodeInfo, embodiment_digest
from simtoreal.data_collection.sensor_health import SensorTrack, one_row
from simtoreal.data_collection.takes import MemoryTake, StreamTake, Take
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError, DiskError
from simtoreal.envs.files import DISK_FULL_ERRNOS
from simtoreal.envs.provenance import git_commit, versions
from simtoreal.envs.rollout import EpisodeResult, Listener, Observation, Step

NewTake = Callable[[EpisodeInfo], Take]

DISK_FULL, DISK_ERROR = "disk_full", "disk_error"
"""``EpisodeInfo.failure`` of an episode that ends where the disk ended."""


def successful(result: EpisodeResult) -> bool:
    """Keep episodes that reached the goal."""
    return result.success


def memory_takes(writer: DatasetWriter) -> NewTake:
    """Buffer every running episode in memory and write it whole at its end: for simulation, where steps are cheap."""
    return lambda info: MemoryTake(writer.add)


def stream_takes(writer: DatasetWriter) -> NewTake:
    """Write every step to disk at once: for teleoperation, where a crash must not cost a person's demonstration.

    ``simtoreal data recover`` turns what a killed process left into an episode.
    """
    return lambda info: StreamTake(writer.part_path(), writer.add, info)


@dataclass
class _Slot:
    take: Take
    info: EpisodeInfo
    sensors: SensorTrack
    state: np.ndarray
    stamps: dict[str, Any]
    step: int = 0
    layout: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    partial: bool = False


class Recorder(Listener):
    """Records every episode of a rollout, with any number of environments.

    An episode is written when it ends, if ``keep`` says so, and leaves nothing behind otherwise.

    A disk that is full, broken or too slow for :func:`stream_takes` never stops the control loop: the episode becomes
    *partial*, its later steps are not recorded, :attr:`alarm` says so, and the next episode tries again. When it ends,
    a partial episode is stored with ``failure="disk_full"`` (or ``"disk_error"``) and ``extra["lost_steps"]`` if there
    is space by then; otherwise its journal stays for ``simtoreal data recover``.

    Args:
        new_take: where steps go, e.g. :func:`memory_takes` or :func:`stream_takes`.
        task: name of the task.
        embodiment: of the environment.
        source, operator: see :class:`~simtoreal.data_collection.episode.EpisodeInfo`.
        keep: decides over a finished episode.
        extra: attached to every episode.
        on_alarm: called once, in the control loop, with the text of every new alarm; must return at once.

    Attributes:
        alarm: why steps of the running (or last) episode are not recorded; empty once a later one is.
    """

    def __init__(
        self,
        new_take: NewTake,
        *,
        task: str,
        embodiment: Embodiment,
        source: str,
        operator: str,
        keep: Callable[[EpisodeResult], bool] = successful,
        extra: dict[str, Any] | None = None,
        on_alarm: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._new_take, self._keep, self._period_s = new_take, keep, embodiment.control_period_s
        self._on_alarm = on_alarm
        self.alarm = ""
        self._common: dict[str, Any] = {
            "task": task, "operator": operator, "source": source, "embodiment": embodiment_digest(embodiment),
            "commit": git_commit(), "versions": versions(), "extra": dict(extra or {}),
        }  # fmt: skip
        self._slots: dict[int, _Slot] = {}

    @property
    def health(self) -> dict[str, Any]:
        """State of the first running episode for a display, JSON-compatible; cheap, and safe to read at any time.

        ``recording``, ``steps``, ``flushed`` (safe from SIGKILL), ``waiting`` (for the disk), ``partial``, ``alarm``,
        and ``sensors`` (see :attr:`~simtoreal.data_collection.sensor_health.SensorTrack.sensors`).
        """
        slot = next(iter(list(self._slots.values())), None)
        if slot is None:
            return {
                "recording": False, "steps": 0, "flushed": 0, "waiting": 0, "partial": False, "alarm": self.alarm,
                "sensors": {},
            }  # fmt: skip
        return {
            "recording": True, "steps": slot.step, "flushed": slot.take.flushed, "waiting": slot.take.waiting,
            "partial": slot.partial, "alarm": self.alarm, "sensors": slot.sensors.sensors,
        }  # fmt: skip

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        self.discard([slot])
        instruction = str(info.get("instruction", ""))
        begun = EpisodeInfo(
            **self._common,
            seed=int(seed),
            success=False,
            failure=ABORTED,
            instruction=instruction,
            instructions=(instruction,),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        )
        sensors = SensorTrack(self._period_s)
        sensors.add(info)
        state = np.asarray(info.get("sim_state", np.empty(0)), dtype=np.float64)
        self._slots[slot] = _Slot(self._new_take(begun), begun, sensors, state, stamps=info)

    def on_step(self, step: Step) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`.

        Raises:
            DatasetError: the environment reports other values than at the step before; names them.
        """
        for row, number in enumerate(step.slots):
            slot = self._slots[int(number)]
            described = slot.info
            arrays = self._row(slot, step, row)
            slot.step += 1
            if described is not slot.info and not slot.partial:
                slot.take.describe(slot.info)
            if not slot.partial:
                self._append(slot, arrays)

    def _append(self, slot: _Slot, arrays: Arrays) -> None:
        try:
            slot.take.append(arrays)
        except DiskError as error:
            self._end_early(slot, error)
        else:
            if self.alarm and not any(other.partial for other in self._slots.values()):
                self.alarm = ""

    def _end_early(self, slot: _Slot, error: DiskError) -> None:
        """Make the episode a partial one."""
        slot.partial = True
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_FULL_ERRNOS
        slot.info = dataclasses.replace(slot.info, failure=DISK_FULL if full else DISK_ERROR)
        slot.take.describe(slot.info)
        self._raise_alarm(
            f"{error} The rest of this episode is not recorded; {slot.take.flushed} of its steps are safe."
        )

    def _raise_alarm(self, text: str) -> None:
        self.alarm = text
        self._on_alarm(text)

    def _row(self, slot: _Slot, step: Step, row: int) -> Arrays:
        info, columns = step.info, dict(slot.columns)
        arrays: Arrays = {f"obs/{key}": value[row] for key, value in step.observation.items()}
        arrays["actions"] = np.asarray(step.action[row], dtype=np.float32)
        arrays["rewards"] = np.asarray(step.reward[row], dtype=np.float32)
        arrays["dones"] = np.asarray(step.terminated[row], dtype=np.int8)
        arrays["states"] = slot.state
        if "sim_state" in info:
            # What is reported with a step is the state after it, which is the one before the next.
            slot.state = np.array(info["sim_state"][row], dtype=np.float64)
        reported = one_row(info, row)
        self._add_stamps(slot, arrays, columns, reported)
        slot.stamps = reported
        slot.sensors.add(reported)
        if "target" in info:
            arrays["step/target"] = np.asarray(info["target"][row], dtype=np.float64)
        for name, kind in (("contacts", np.uint8), ("milestones", np.uint8), ("scene_motion", np.float64)):
            if info.get(name):
                columns[name] = tuple(info[name])
                arrays[f"step/{name}"] = np.array([value[row] for value in info[name].values()], dtype=kind)
        instructions = slot.info.instructions
        # A change during a step is seen by the policy from the next one on.
        arrays["step/instruction"] = np.asarray(len(instructions) - 1, dtype=np.int32)
        if "instruction" in info and (text := str(info["instruction"][row])) != instructions[-1]:
            slot.info = dataclasses.replace(slot.info, instruction=text, instructions=(*instructions, text))
        self._check_layout(slot, arrays, columns)
        return arrays

    def _add_stamps(
        self, slot: _Slot, arrays: Arrays, columns: dict[str, tuple[str, ...]], reported: dict[str, Any]
    ) -> None:
        """Stamps of the observation before the action; they were reported with it, at the step before or the reset."""
        simulated = round(slot.step * self._period_s * 1e9)
        arrays["step/timestamp_ns"] = np.asarray(slot.stamps.get("timestamp_ns", simulated), dtype=np.int64)
        if ("timestamp_ns" in slot.stamps) != ("timestamp_ns" in reported):
            raise DatasetError("info['timestamp_ns'] is reported at the reset or at the steps only; expected at both.")
        for name in ("capture_ns", "receive_ns"):
            if slot.stamps.get(name):
                columns[name] = tuple(slot.stamps[name])
                arrays[f"step/{name}"] = np.array(list(slot.stamps[name].values()), dtype=np.int64)

    def _check_layout(self, slot: _Slot, arrays: Arrays, columns: dict[str, tuple[str, ...]]) -> None:
        layout = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        if slot.step == 0:
            slot.layout, slot.columns = layout, columns
            slot.info = dataclasses.replace(slot.info, columns=columns)
            return
        if layout != slot.layout or columns != slot.columns:
            names = {*layout, *slot.layout}
            wrong = sorted(name for name in names if layout.get(name) != slot.layout.get(name))
            wrong += sorted(f"columns of step/{name}" for name in columns if columns[name] != slot.columns.get(name))
            raise DatasetError(
                f"step {slot.step} of the episode with seed {slot.info.seed} reports something else than the steps "
                f"before: {', '.join(wrong)}. An environment must report the same names and shapes from its reset on."
            )

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`.

        Raises:
            DatasetError: the episode cannot be written; earlier ones are intact. A full disk raises only for takes in
                memory; what is streamed raises the alarm instead.
        """
        running = self._slots.pop(slot)
        if not self._keep(result):
            running.take.discard()
            return
        try:
            running.take.finish()
        except DiskError as error:
            if not running.partial:
                self._end_early(running, error)
        if running.partial and not running.take.flushed:
            running.take.discard()
            return
        try:
            running.take.keep(self._finished(running, result))
        except DiskError as error:
            if not running.take.recoverable:
                raise
            self._raise_alarm(f"{error} 'simtoreal data recover' makes its {running.take.flushed} steps an episode.")

    def _finished(self, running: _Slot, result: EpisodeResult) -> EpisodeInfo:
        extra = dict(running.info.extra)
        if sensors := running.sensors.summary():
            extra["sensors"] = sensors
        duration_s = result.duration_s
        if running.partial:
            stored = running.take.flushed
            extra["lost_steps"], duration_s = running.step - stored, stored * self._period_s
        return dataclasses.replace(
            running.info,
            success=result.success and not running.partial,
            failure=running.info.failure if running.partial else result.failure,
            milestones={name: bool(value) for name, value in result.milestones.items()},
            duration_s=duration_s,
            extra=extra,
        )

    def discard(self, slots: Sequence[int] | None = None) -> None:
        """Drop running episodes (all by default) without a trace, e.g. when a person repeats a take."""
        for slot in list(self._slots) if slots is None else slots:
            running = self._slots.pop(slot, None)
            if running is not None:
                running.take.discard()

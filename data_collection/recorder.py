"""Turns what happens in a rollout into episodes of a dataset."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simtoreal.data_collection.episode import ABORTED, Arrays, EpisodeInfo, embodiment_digest
from simtoreal.data_collection.takes import MemoryTake, StreamTake, Take
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.provenance import git_commit, versions
from simtoreal.envs.rollout import EpisodeResult, Listener, Observation, Step

NewTake = Callable[[EpisodeInfo], Take]


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
    state: np.ndarray
    step: int = 0
    instructions: list[str] = field(default_factory=list)
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Recorder(Listener):
    """Records every episode of a rollout, with any number of environments.

    An episode is written when it ends, if ``keep`` says so, and leaves nothing behind otherwise.

    Args:
        new_take: where steps go, e.g. :func:`memory_takes` or :func:`stream_takes`.
        task: name of the task.
        embodiment: of the environment.
        source, operator: see :class:`~simtoreal.data_collection.episode.EpisodeInfo`.
        keep: decides over a finished episode.
        extra: attached to every episode.
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
    ) -> None:
        self._new_take, self._keep, self._period_s = new_take, keep, embodiment.control_period_s
        self._common: dict[str, Any] = {
            "task": task, "operator": operator, "source": source, "embodiment": embodiment_digest(embodiment),
            "commit": git_commit(), "versions": versions(), "extra": dict(extra or {}),
        }  # fmt: skip
        self._slots: dict[int, _Slot] = {}

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
        state = np.asarray(info.get("sim_state", np.empty(0)), dtype=np.float64)
        self._slots[slot] = _Slot(self._new_take(begun), begun, state, instructions=[instruction])

    def on_step(self, step: Step) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        for row, number in enumerate(step.slots):
            slot = self._slots[int(number)]
            slot.take.append(self._row(slot, step, row))
            slot.step += 1

    def _row(self, slot: _Slot, step: Step, row: int) -> Arrays:
        info = step.info
        arrays: Arrays = {f"obs/{key}": value[row] for key, value in step.observation.items()}
        arrays["actions"] = np.asarray(step.action[row], dtype=np.float32)
        arrays["rewards"] = np.asarray(step.reward[row], dtype=np.float32)
        arrays["dones"] = np.asarray(step.terminated[row], dtype=np.int8)
        arrays["states"] = slot.state
        if "sim_state" in info:
            # The state reported with a step is the one after it, which is the one before the next.
            slot.state = np.array(info["sim_state"][row], dtype=np.float64)
        if "target" in info:
            arrays["step/target"] = np.asarray(info["target"][row], dtype=np.float64)
        simulated = round(slot.step * self._period_s * 1e9)
        stamp = info["timestamp_ns"][row] if "timestamp_ns" in info else simulated
        arrays["step/timestamp_ns"] = np.asarray(stamp, dtype=np.int64)
        for name in ("contacts", "milestones"):
            if info.get(name):
                slot.columns[name] = tuple(info[name])
                arrays[f"step/{name}"] = np.array([value[row] for value in info[name].values()], dtype=np.uint8)
        arrays["step/instruction"] = np.asarray(self._instruction_index(slot, info, row), dtype=np.int32)
        return arrays

    def _instruction_index(self, slot: _Slot, info: dict[str, Any], row: int) -> int:
        """Index of the instruction in force; a change during a step is seen by the policy from the next one on."""
        current = len(slot.instructions) - 1
        if "instruction" in info and (text := str(info["instruction"][row])) != slot.instructions[-1]:
            slot.instructions.append(text)
        return current

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`.

        Raises:
            DatasetError: the episode cannot be written; it is discarded and earlier ones are intact.
        """
        running = self._slots.pop(slot)
        if not self._keep(result):
            running.take.discard()
            return
        content = {name: getattr(running.info, name) for name in running.info.__dataclass_fields__}
        content.update(
            success=result.success,
            failure=result.failure,
            instruction=running.instructions[-1],
            instructions=tuple(running.instructions),
            milestones={name: bool(value) for name, value in result.milestones.items()},
            columns=running.columns,
            duration_s=result.duration_s,
        )
        running.take.keep(EpisodeInfo(**content))

    def discard(self, slots: Sequence[int] | None = None) -> None:
        """Drop running episodes (all by default) without a trace, e.g. when a person repeats a take."""
        for slot in list(self._slots) if slots is None else slots:
            running = self._slots.pop(slot, None)
            if running is not None:
                running.take.discard()

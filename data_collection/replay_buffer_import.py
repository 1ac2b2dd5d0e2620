"""Reads the replay buffers of diffusion_policy and UMI: zarr arrays ``data/<key>`` and ``meta/episode_ends``.

Neither stores the control rate; that of PushT (10 Hz) and of UMI's cameras (59.94 Hz) is known, otherwise the user
gives it. UMI stores no actions either: as in its own training code they are the gripper poses, here those of the next
step, so that the action of a step is what the step leads to.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.episode import Arrays, EpisodeInfo, embodiment_digest
from simtoreal.data_collection.exchange import (
    MOST_EPISODES,
    is_image_shape,
    observation_names,
    pixel_scale,
    require_size,
    single_precision,
    step_name,
    to_image,
)
from simtoreal.data_collection.foreign_embodiment import foreign_embodiment, foreign_task
from simtoreal.data_collection.zarr_store import StoredArray, open_array, open_store
from simtoreal.envs.errors import DatasetError

PUSHT_KEYS, PUSHT_HZ = frozenset({"img", "state", "action", "n_contacts"}), 10.0
UMI_HZ = 59.94
_UMI_ROBOT = re.compile(r"robot(\d+)_eef_pos")
_UMI_POSE = ("eef_pos", "eef_rot_axis_angle", "gripper_width")
# When diffusion_policy's recorder of a real robot took the observations, in seconds. Steps shorter than half or longer
# than two control periods show another unit.
_STAMPS, _PERIODS = "timestamp", (0.5, 2.0)
# Where a UMI episode starts and ends, repeated at every step: not an observation, it would give the end away.
_UMI_BOUNDARY = re.compile(r"robot\d+_demo_(start|end)_pose")


class ReplayBufferReader:
    """A replay buffer, opened for :func:`~simtoreal.data_collection.exchange.import_dataset`.

    Args:
        path: ``.zarr`` folder or zip file.
        control_hz: rate of the control steps, where the layout does not tell it.
        task: name to store the episodes under; by default the name of the file.

    Raises:
        DatasetError: not a replay buffer, damaged or unsafe; or its rate is unknown.
        MissingDependencyError: a codec's library is not installed.
    """

    def __init__(self, path: Path, *, control_hz: float | None = None, task: str | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        self.masks: Mapping[str, Sequence[str]] = {}
        self._store = open_store(path)
        try:
            self._describe(control_hz, task)
        except BaseException:
            self._store.close()
            raise

    def __enter__(self) -> ReplayBufferReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def _describe(self, control_hz: float | None, task: str | None) -> None:
        ends = open_array(self._store, "meta/episode_ends")
        if len(ends.shape) != 1 or ends.dtype.kind not in "iu" or not 0 < ends.shape[0] <= MOST_EPISODES:
            raise DatasetError(f"{ends.where}: expected 1 to {MOST_EPISODES} integers, found shape {ends.shape}.")
        self._ends = ends.rows(0, ends.shape[0]).astype(np.int64)
        self._arrays = {name: open_array(self._store, f"data/{name}") for name in self._store.arrays("data")}
        if not self._arrays:
            raise DatasetError(f"{self.path}: has no arrays below 'data'.")
        total = int(self._ends[-1])
        if np.any(np.diff(self._ends, prepend=0) <= 0):
            raise DatasetError(f"{ends.where}: must increase from episode to episode; every episode needs a step.")
        for array in self._arrays.values():
            if array.shape[0] < total:
                raise DatasetError(f"{array.where} has {array.shape[0]} rows, 'meta/episode_ends' needs {total}.")
        self.episodes: Sequence[str] = [f"{index:06d}" for index in range(len(self._ends))]
        robots = [int(match[1]) for name in self._arrays if (match := _UMI_ROBOT.fullmatch(name))]
        umi = bool(robots) and "action" not in self._arrays
        if umi:
            parts = (f"robot{robot}_{part}" for robot in sorted(robots) for part in _UMI_POSE)
            self._action_keys = [key for key in parts if key in self._arrays]
        else:
            self._action_keys = [name for name in ("action", "actions") if name in self._arrays][:1]
        if not self._action_keys:
            raise DatasetError(f"{self.path}: has no 'data/action'; it holds {', '.join(self._arrays)}.")
        self._umi = umi
        rate_hz = control_hz or self._known_rate()
        self._stamped = self._has_stamps(rate_hz)
        self._assign_names()
        name = task or re.sub(r"\.(zarr|zip)$", "", re.sub(r"\.zip$", "", self.path.name)) or "replay_buffer"
        self._task = name
        self.tasks: Mapping[str, Mapping[str, Any]] = {name: foreign_task(name)}
        dims = {key: math.prod(self._arrays[key].shape[1:]) for key in self._action_keys}
        names = [f"{key}_{i}" for key, size in dims.items() for i in range(size)] if umi else ()
        self.embodiment = foreign_embodiment(
            name="umi" if umi else name,
            control_hz=rate_hz,
            action_dim=sum(dims.values()),
            action_names=names,
            observations={own: self._arrays[key].shape[1:] for key, own in self._observations.items()},
        )
        self.notes.append("the format does not mark success; every episode counts as a demonstration that succeeded")

    def _assign_names(self) -> None:
        own = [key for key in self._arrays if self._umi or key not in self._action_keys]
        own = [key for key in own if key != _STAMPS or not self._stamped]
        images = [key for key in own if is_image_shape(self._arrays[key].shape[1:])]
        kept = [key for key in own if len(self._arrays[key].shape) <= 3 or key in images]
        observed = [key for key in kept if not _UMI_BOUNDARY.fullmatch(key)]
        self._observations = observation_names(observed, images)
        self._images = frozenset(images)
        self._scales: dict[str, float] = {}
        self._extra: dict[str, str] = {}
        for key in own:
            if key not in observed:
                self._extra[key] = step_name(key, self._extra.values())
        self.notes += [
            f"observation '{key}' is called '{name}' here" for key, name in self._observations.items() if key != name
        ]

    def _has_stamps(self, rate_hz: float) -> bool:
        """Whether the store holds something that looks like times of the observations in seconds."""
        array = self._arrays.get(_STAMPS)
        if array is None or array.dtype.kind != "f" or math.prod(array.shape[1:]) != 1:
            return False
        episodes = [rows.reshape(-1).astype(np.float64) for rows in self._readable(_STAMPS)]
        periods = np.concatenate([np.diff(stamps) for stamps in episodes] or [np.empty(0)]) * rate_hz
        if not (len(periods) and np.isfinite(periods).all() and _PERIODS[0] <= np.median(periods) <= _PERIODS[1]):
            return False
        self.notes.append(f"'{_STAMPS}' is taken for the times of the observations in seconds (step/timestamp_ns)")
        return True

    def _known_rate(self) -> float:
        if self._umi:
            self.notes.append(f"control rate taken to be {UMI_HZ} Hz, that of UMI's cameras; --control-hz changes it")
            return UMI_HZ
        if set(self._arrays) >= PUSHT_KEYS:
            self.notes.append(f"control rate taken to be {PUSHT_HZ:g} Hz, that of PushT; --control-hz changes it")
            return PUSHT_HZ
        raise DatasetError(f"{self.path}: the format does not store the control rate. Give it with --control-hz.")

    def read(self, episode: str) -> tuple[Arrays, EpisodeInfo]:
        """See :class:`~simtoreal.data_collection.exchange.Reader`."""
        index = int(episode)
        stop = int(self._ends[index])
        start = int(self._ends[index - 1]) if index else 0
        steps = stop - start
        row_bytes = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in self._arrays.values())
        require_size(steps * row_bytes, f"{self.path}: episode {index}")
        last = np.arange(steps) == steps - 1
        arrays: Arrays = {
            "actions": self._actions(start, stop),
            "rewards": np.zeros(steps, np.float32),
            "dones": last.astype(np.int8),
            "states": np.empty((steps, 0)),
        }
        for key, name in self._observations.items():
            values = self._arrays[key].rows(start, stop)
            image = key in self._images
            where = self._arrays[key].where
            arrays[f"obs/{name}"] = to_image(values, where, self._scale(key)) if image else single_precision(values)
        for key, name in self._extra.items():
            arrays[name] = self._arrays[key].rows(start, stop)
        if self._stamped:
            stamps_s = self._arrays[_STAMPS].rows(start, stop).reshape(steps).astype(np.float64)
            arrays["step/timestamp_ns"] = np.rint(stamps_s * 1e9).astype(np.int64)
        info = EpisodeInfo(
            task=self._task, seed=index, success=True, operator=self._task, source="umi" if self._umi else "zarr",
            embodiment=embodiment_digest(self.embodiment), instructions=("",),
            duration_s=steps * self.embodiment.control_period_s,
            extra={"imported_from": self.path.name, "source_episode": index, "success_assumed": True},
        )  # fmt: skip
        return arrays, info

    def _scale(self, key: str) -> float:
        if key not in self._scales:
            self._scales[key] = pixel_scale(self._readable(key))
        return self._scales[key]

    def _readable(self, key: str) -> Iterator[np.ndarray]:
        """Rows of an array, episode by episode, as far as they are not damaged."""
        for start, stop in itertools.pairwise((0, *self._ends.tolist())):
            with contextlib.suppress(DatasetError):
                yield self._arrays[key].rows(start, stop)

    def _actions(self, start: int, stop: int) -> np.ndarray:
        def flat(array: StoredArray) -> np.ndarray:
            return array.rows(start, stop).reshape(stop - start, -1).astype(np.float32)

        joined = np.concatenate([flat(self._arrays[key]) for key in self._action_keys], axis=1)
        return np.concatenate([joined[1:], joined[-1:]]) if self._umi else joined

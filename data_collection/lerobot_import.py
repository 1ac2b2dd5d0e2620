"""Reads LeRobotDataset v3.0 and v2.1: our exports exactly (but for the video codec), others as a foreign robot."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection import lerobot_layout as layout
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, embodiment_digest
from simtoreal.data_collection.exchange import (
    is_image_shape,
    observation_names,
    require_size,
    single_precision,
    step_name,
    unique_name,
)
from simtoreal.data_collection.filters import action_digest
from simtoreal.data_collection.foreign_embodiment import PROPRIO, foreign_embodiment, foreign_task
from simtoreal.data_collection.lerobot_export import SIDECAR_VERSION
from simtoreal.data_collection.lerobot_index import IMAGE_TYPES, EpisodeEntry, Index, read_index, read_json
from simtoreal.data_collection.lerobot_video import decode
from simtoreal.data_collection.parquet_rows import ParquetRows, to_numpy
from simtoreal.envs.embodiment import Embodiment, ProprioSpec
from simtoreal.envs.errors import ConfigError, DatasetError

_SKIPPED_TYPES = ("string", "language", "audio")
# Made of 'task_index', also where an export of ours stored it: lerobot's tools number tasks anew.
_INSTRUCTION, _OWN_INSTRUCTION = "step/instruction", f"{layout.OWN}step.instruction"
# openpi and older datasets leave out the prefix.
_ACTION_KEYS = ("action", "actions")
_STATE_KEYS = ("observation.state", "state")
_REWARD_KEYS = ("next.reward", "reward")


@dataclass(frozen=True)
class _Rows:
    """Where an episode is in its parquet file: ``entry.steps`` rows of ``columns`` from ``start`` on."""

    entry: EpisodeEntry
    file: ParquetRows
    columns: Mapping[str, Any]
    start: int

    def numbers(self, feature: str, shape: tuple[int, ...]) -> np.ndarray:
        """Rows ``(T, *shape)`` of a feature; ``(T,)`` for the shape ``(1,)``."""
        column = self.columns[feature].slice(self.start, self.entry.steps)
        return to_numpy(column, shape, f"{self.entry.data}: '{feature}'")


class LeRobotReader:
    """A LeRobotDataset, opened for :func:`~simtoreal.data_collection.exchange.import_dataset`.

    Args:
        root: folder that holds ``meta``, ``data`` and ``videos``.
        task: name to store the episodes under; by default the name of the folder.

    Raises:
        ConfigError: ``task`` is given for an export of our own, which says it itself.
        DatasetError: not such a dataset, damaged or unsafe.
    """

    def __init__(self, root: Path, *, task: str | None = None) -> None:
        self.root = root
        self.notes: list[str] = []
        self.index: Index = read_index(root)
        self._entries = {f"{entry.index:06d}": entry for entry in self.index.entries}
        self.episodes: Sequence[str] = list(self._entries)
        self.masks: Mapping[str, Sequence[str]] = {}
        self._table: tuple[Path, ParquetRows, dict[str, Any]] | None = None
        sidecar = layout.inside(root, layout.SIDECAR, {}, str(root))
        self._own = read_json(sidecar) if sidecar.is_file() else None
        self._kinds: dict[str, str] = {}
        for feature, described in self.index.features.items():
            kind, shape = described["dtype"], described["shape"]
            # Depth may also be an array of numbers. What an export of ours holds says itself what it is.
            observed = self._own is None and feature.startswith(("observation.", f"{layout.OWN}obs."))
            spatial = kind in IMAGE_TYPES or (observed and len(shape) == 3)
            if kind in _SKIPPED_TYPES:
                self.notes.append(f"left out feature '{feature}' of type {kind}")
            elif spatial and not (kind in IMAGE_TYPES and is_image_shape(shape)):
                self.notes.append(f"left out feature '{feature}' of shape {shape}, which is no RGB image")
            else:
                self._kinds[feature] = kind
        self._names: dict[str, str] = {}
        if self._own is not None:
            if task is not None:
                raise ConfigError(f"{root} says itself which task it shows; omit --task.")
            self._describe_own(self._own, sidecar)
        else:
            self._describe_foreign(task or root.resolve().name)

    def __enter__(self) -> LeRobotReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._table = None

    def _array_names(self) -> dict[str, str]:
        """Feature -> our array, of a dataset that does not say it itself."""
        features = self._kinds
        action = next((key for key in _ACTION_KEYS if key in features), None)
        if action is None:
            raise DatasetError(f"{self.root}: has no feature 'action'; it holds {', '.join(features)}.")
        # One of several axes (an arm per row) is an observation like others.
        vectors = [key for key in features if len(self.index.features[key]["shape"]) == 1]
        state = next((key for key in _STATE_KEYS if key in vectors), None)
        reward = next((key for key in _REWARD_KEYS if key in features), None)
        fixed = {action: "actions", "timestamp": "step/timestamp_ns"}
        fixed |= {state: f"obs/{PROPRIO}"} if state else {}
        fixed |= {reward: "rewards"} if reward else {}
        images = [key for key, kind in features.items() if kind in IMAGE_TYPES]
        observed = [*images, *(key for key in features if key.startswith("observation.") and key not in images)]
        observed = [key for key in observed if key not in fixed]
        observations = observation_names(observed, images, taken={PROPRIO} if state else ())
        names: dict[str, str] = {}
        # Names that are given here whatever the features are called.
        taken = {*fixed.values(), _INSTRUCTION}
        for key in features:
            if (key in layout.DEFAULTS and key != "timestamp") or key in (layout.DONE, _OWN_INSTRUCTION):
                continue
            wanted = name = fixed.get(key, "")
            if key in observations:
                wanted, name = f"obs/{observation_names([key], images)[key]}", f"obs/{observations[key]}"
            elif key.startswith(layout.OWN):
                wanted = key.removeprefix(layout.OWN).replace(".", "/", 1)
                name = unique_name(wanted, taken)
            elif not name:
                plain = key.replace(".", "_").replace(" ", "_")
                wanted = step_name(plain)
                name = unique_name(wanted, taken)
                if wanted != f"step/{plain}":
                    self.notes.append(f"feature '{key}' is called '{wanted}' here")
            if name != wanted:
                self.notes.append(f"feature '{key}' is called '{name}' here; '{wanted}' is another one")
            taken.add(name)
            names[key] = name
        return names

    def _describe_own(self, own: dict[str, Any], sidecar: Path) -> None:
        if own.get("version") != SIDECAR_VERSION:
            raise DatasetError(f"{sidecar}: has version {own.get('version')}; this program reads {SIDECAR_VERSION}.")
        self.embodiment = Embodiment.from_dict(own.get("embodiment", {}))
        try:
            self.tasks: Mapping[str, Mapping[str, Any]] = dict(own["tasks"])
            self.masks = {str(k): [f"{int(i):06d}" for i in members] for k, members in own["masks"].items()}
            self._own_arrays = {str(name): str(feature) for name, feature in own["arrays"].items()}
            shapes = own["shapes"].items()
            self._shapes = {str(name): (tuple(map(int, shape)), np.dtype(kind)) for name, (shape, kind) in shapes}
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DatasetError(f"{sidecar}: is damaged ({error!r}).") from error
        if any(kind.kind not in "iufb" or min(shape, default=0) < 0 for shape, kind in self._shapes.values()):
            raise DatasetError(f"{sidecar}: 'shapes' names types that are not numbers, or negative sizes.")
        missing = [feature for feature in self._own_arrays.values() if feature not in self._kinds]
        if missing:
            raise DatasetError(f"{sidecar}: names the feature '{missing[0]}', which info.json does not have like that.")
        self._task = next(iter(self.tasks), self.root.name)

    def _describe_foreign(self, task: str) -> None:
        self._task, features = task, self.index.features
        self._names = self._array_names()
        arrays = {name: key for key, name in self._names.items()}
        names = features[arrays["actions"]]["names"]
        dims = int(np.prod(features[arrays["actions"]]["shape"], dtype=np.int64))
        robot = self.index.robot
        embodiment = foreign_embodiment(
            name=robot if robot != "unknown" else task,
            control_hz=self.index.fps,
            action_dim=dims,
            action_names=names if len(set(names)) == dims == len(names) else (),
            observations={name[4:]: features[key]["shape"] for name, key in arrays.items() if name.startswith("obs/")},
        )
        width = embodiment.proprio.dim
        if width and len(set(own := features[arrays[f"obs/{PROPRIO}"]]["names"])) == width:
            proprio = ProprioSpec(names=tuple(own), units=embodiment.proprio.units)
            embodiment = dataclasses.replace(embodiment, proprio=proprio)
        self.embodiment = embodiment
        self.tasks = {task: foreign_task(task, instruction=self.index.tasks.get(0, ""))}
        if layout.SUCCESS not in features:
            self.notes.append("there is no 'next.success'; every episode counts as a demonstration that succeeded")

    def read(self, episode: str) -> tuple[Arrays, EpisodeInfo]:
        """See :class:`~simtoreal.data_collection.exchange.Reader`."""
        entry = self._entries[episode]
        rows = self._rows(entry)
        arrays = self._foreign_content(rows) if self._own is None else self._own_content(rows)
        sidecar = self._episode_sidecar(entry, arrays)
        if sidecar is None and self.masks:
            self.masks = {}  # lerobot's tools number episodes anew, so the numbers may mean others
            self.notes.append(f"left out the masks: episode {entry.index} is not the one that was exported as it")
        if sidecar is not None:
            extra = layout.inside(self.root, layout.EPISODE_ARRAYS, {"episode_index": entry.index}, str(self.root))
            arrays |= _read_arrays(extra) if extra.is_file() else {}
            info = EpisodeInfo.from_json(sidecar, path=self.root, steps=entry.steps)
            return arrays, dataclasses.replace(info, embodiment=embodiment_digest(self.embodiment))
        return arrays, self._info(rows, arrays)

    def _rows(self, entry: EpisodeEntry) -> _Rows:
        """Return the rows of an episode, which must be whole and in order; their columns are those without images."""
        if self._table is None or self._table[0] != entry.data:
            file = ParquetRows(entry.data)
            wanted = [name for name, kind in self._kinds.items() if kind not in IMAGE_TYPES]
            self._table = entry.data, file, file.columns(wanted)
        _, file, columns = self._table
        where = f"{entry.data}: episode {entry.index}"
        episode_index = to_numpy(columns["episode_index"], (1,), f"{entry.data}: 'episode_index'")
        own = np.flatnonzero(episode_index == entry.index)
        if len(own) != entry.steps or not len(own) or own[-1] - own[0] + 1 != len(own):
            raise DatasetError(f"{where} has {len(own)} rows, meta says {entry.steps} in one piece.")
        start = int(own[0])
        frames = to_numpy(columns["frame_index"].slice(start, entry.steps), (1,), f"{where}: 'frame_index'")
        if not np.array_equal(frames, np.arange(entry.steps)):
            raise DatasetError(f"{where}: 'frame_index' does not count from 0 to {entry.steps - 1}.")
        return _Rows(entry, file, columns, start)

    def _feature(self, feature: str, rows: _Rows) -> np.ndarray:
        """Rows of one feature of one episode, images as uint8 ``(T, H, W, 3)``."""
        shape, kind, entry = self.index.features[feature]["shape"], self._kinds[feature], rows.entry
        where = f"{entry.data}: '{feature}'"
        if kind not in IMAGE_TYPES:
            return rows.numbers(feature, shape)
        require_size(entry.steps * int(np.prod(shape, dtype=np.int64)), f"{where} of episode {entry.index}")
        if kind == "video":
            path, start_s = entry.videos[feature]
            return decode(path, start_s, entry.steps, self.index.fps, shape)
        images = np.empty((entry.steps, *shape), dtype=np.uint8)
        for row, encoded in enumerate(rows.file.images(feature, rows.start, rows.start + entry.steps)):
            images[row] = _decode_image(encoded, shape, f"{where}, row {rows.start + row}")
        return images

    def _own_content(self, rows: _Rows) -> Arrays:
        arrays: Arrays = {}
        entry = rows.entry
        for name, (shape, kind) in self._shapes.items():
            total = entry.steps * int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            require_size(total, f"{self.root}: '{name}' of episode {entry.index}")
            if name in self._own_arrays:
                values = self._feature(self._own_arrays[name], rows)
                if values.size != entry.steps * int(np.prod(shape, dtype=np.int64)):
                    raise DatasetError(f"{self.root}: '{name}' has another size than {layout.SIDECAR} says.")
                arrays[name] = values.reshape(entry.steps, *shape).astype(kind)
            else:
                arrays[name] = np.zeros((entry.steps, *shape), dtype=kind)
        return arrays

    def _foreign_content(self, rows: _Rows) -> Arrays:
        steps = rows.entry.steps
        arrays: Arrays = {"rewards": np.zeros(steps, np.float32), "states": np.empty((steps, 0))}
        for feature, name in self._names.items():
            values = self._feature(feature, rows)
            if name == "actions":
                values = values.reshape(steps, -1).astype(np.float32)
            elif name == "rewards":
                values = values.reshape(steps).astype(np.float32)
            elif name == "step/timestamp_ns":
                values = np.rint(values.astype(np.float64) * 1e9).astype(np.int64)
            elif name.startswith("obs/") and self._kinds[feature] not in IMAGE_TYPES:
                values = values.reshape(steps, *self.index.features[feature]["shape"])
                values = single_precision(values)
            arrays[name] = values
        success = self._success(rows)
        last = np.arange(steps) == steps - 1
        arrays.setdefault("dones", (last & (success is not False)).astype(np.int8))
        return arrays

    def _success(self, rows: _Rows) -> bool | None:
        """Whether an episode succeeded, None if the dataset does not say it."""
        if layout.SUCCESS not in self._kinds:
            return None
        return bool(rows.numbers(layout.SUCCESS, self.index.features[layout.SUCCESS]["shape"]).any())

    def _episode_sidecar(self, entry: EpisodeEntry, arrays: Arrays) -> str | None:
        """Text of the description of an episode, if it is of our own and fits."""
        path = layout.inside(self.root, layout.EPISODE_SIDECAR, {"episode_index": entry.index}, str(self.root))
        if self._own is None or not path.is_file():
            return None
        content = read_json(path)
        digest = action_digest(arrays["actions"]) if "actions" in arrays else None
        same = content.get("steps") == entry.steps and content.get("actions", digest) == digest
        if not same or not isinstance(content.get("episode"), dict):
            self.notes.append(f"{path.name} describes another episode and is ignored")
            return None
        return json.dumps(content["episode"])

    def _info(self, rows: _Rows, arrays: Arrays) -> EpisodeInfo:
        entry = rows.entry
        numbers = rows.numbers("task_index", (1,))
        unknown = sorted(set(numbers.tolist()) - set(self.index.tasks))
        if unknown:
            raise DatasetError(f"{entry.data}: 'task_index' names task {unknown[0]}, which meta/tasks does not have.")
        used = list(dict.fromkeys(numbers.tolist()))
        texts = tuple(self.index.tasks[number] for number in used)
        arrays[_INSTRUCTION] = np.array([used.index(number) for number in numbers.tolist()], dtype=np.int32)
        judged = self._success(rows)
        success = bool(arrays["dones"].any()) if judged is None else judged
        extra: dict[str, Any] = {"imported_from": self.root.name, "source_episode": entry.index}
        return EpisodeInfo(
            task=self._task, seed=entry.index, success=success, failure="" if success else "unknown",
            operator=self.root.resolve().name, source="lerobot", embodiment=embodiment_digest(self.embodiment),
            instruction=texts[-1], instructions=texts, duration_s=entry.steps / self.index.fps,
            extra=extra if judged is not None else {**extra, "success_assumed": True},
        )  # fmt: skip


def _decode_image(encoded: bytes, shape: tuple[int, ...], where: str) -> np.ndarray:
    import cv2

    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None or image.shape != shape:
        raise DatasetError(f"{where}: is not an image of {shape[1]} x {shape[0]} pixels.")
    return image


def _read_arrays(path: Path) -> Arrays:
    """Arrays of an ``.npz`` file, whose sizes are checked before they are read."""
    require_size(path.stat().st_size, str(path))
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            require_size(sum(member.file_size for member in archive.infolist()), str(path))
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise DatasetError(f"{path}: is damaged ({error}).") from error

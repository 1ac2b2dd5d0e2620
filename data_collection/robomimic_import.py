"""Reads robomimic's dataset: one HDF5 file with ``data/demo_<i>`` and ``mask`` (robomimic 0.3, docs/datasets/overview).

Files of our own (:mod:`simtoreal.data_collection.robomimic_export`) say themselves what robomimic does not record.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from simtoreal.data_collection.episode import (
    Arrays,
    EpisodeInfo,
    array_names,
    embodiment_digest,
    refuse_foreign_content,
)
from simtoreal.data_collection.exchange import (
    LARGEST_JSON_BYTES,
    MOST_EPISODES,
    is_image_shape,
    judge_success,
    observation_names,
    parse_object,
    pixel_scale,
    require_size,
    single_precision,
    step_name,
    to_image,
)
from simtoreal.data_collection.foreign_embodiment import IMAGE_SUFFIX, foreign_embodiment, foreign_task
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, DatasetError

SIDECAR = "simtoreal"
GYM_TYPE = 2
# robosuite's environments run their controllers at 20 Hz unless env_kwargs say otherwise.
_ROBOSUITE_TYPE, _ROBOSUITE_HZ = 1, 20.0
_DERIVED_GROUPS = frozenset({"next_obs"})
_LARGEST_CONSTANT = 4096
# What h5py raises for damaged metadata, names that are no UTF-8 and types that numpy does not have.
_DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError)


class RobomimicReader:
    """A robomimic file, opened for :func:`~simtoreal.data_collection.exchange.import_dataset`.

    Observation keys of three dimensions become cameras; the others keep their names. Use as a context manager.

    Args:
        path: HDF5 file.
        control_hz: rate of the control steps, for files whose ``env_args`` do not tell it.
        task: name to store the episodes under; by default the name of the environment.

    Raises:
        ConfigError: ``task`` or ``control_hz`` is given for an export of our own, which says them itself.
        DatasetError: not a robomimic file, damaged or unsafe; or its rate is unknown.
    """

    def __init__(self, path: Path, *, control_hz: float | None = None, task: str | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        self._scales: dict[str, float] = {}
        self._extras: dict[str, str] = {}
        if path.is_symlink() or not path.is_file():
            raise DatasetError(f"{path}: is not a file (links are refused); expected a robomimic HDF5 file.")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise DatasetError(f"{path}: cannot be opened as HDF5 ({error}).") from error
        try:
            self._describe(control_hz, task)
        except BaseException as error:
            self._file.close()
            if isinstance(error, _DAMAGE):
                raise DatasetError(f"{path}: reading failed, the file is damaged ({error}).") from error
            raise

    def __enter__(self) -> RobomimicReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _describe(self, control_hz: float | None, task: str | None) -> None:
        data = _own_group(self._file, "data", self.path)
        names = [name for name in data if re.fullmatch(r"demo_\d+", name)]
        if not names:
            raise DatasetError(f"{self.path}: 'data' holds no demo_<number>; not a robomimic file.")
        if len(names) > MOST_EPISODES:
            raise DatasetError(f"{self.path}: holds {len(names)} demos; at most {MOST_EPISODES} are read.")
        self.episodes: Sequence[str] = sorted(names, key=lambda name: int(name[5:]))
        self.masks = self._read_masks()
        own = data.attrs.get(SIDECAR)
        self._own = own is not None
        if self._own:
            if task is not None or control_hz is not None:
                raise ConfigError(f"{self.path} says itself what it holds; omit --task and --control-hz.")
            content = parse_object(str(own), f"{self.path}: attribute '{SIDECAR}'")
            self.embodiment = Embodiment.from_dict(content.get("embodiment", {}))
            self.tasks: Mapping[str, Mapping[str, Any]] = content.get("tasks", {})
            return
        env = parse_object(str(data.attrs.get("env_args", "{}")), f"{self.path}: attribute 'env_args'")
        self._task = task or str(env.get("env_name") or self.path.stem)
        env_id = str(env.get("env_name", "")) if env.get("type") == GYM_TYPE else ""
        self.tasks = {self._task: {**foreign_task(self._task, env_id=env_id), "env_args": env}}
        first = self._demo(self.episodes[0])
        observations = _own_group(first, "obs", self.path)
        shapes = {key: tuple(value.shape[1:]) for key, value in observations.items() if isinstance(value, h5py.Dataset)}
        self._names = observation_names(shapes, [key for key, shape in shapes.items() if is_image_shape(shape)])
        renamed = {key: name for key, name in self._names.items() if key != name}
        self.notes += [f"observation '{key}' is called '{name}' here" for key, name in renamed.items()]
        self._unusable = [key for key, shape in shapes.items() if len(shape) == 3 and not is_image_shape(shape)]
        self.notes += [f"left out observation '{key}' of shape {shapes[key]}" for key in self._unusable]
        self.embodiment = foreign_embodiment(
            name=str(env.get("env_name") or self._task),
            control_hz=control_hz or self._rate(env),
            action_dim=self._action_dim(first),
            observations={self._names[key]: shape for key, shape in shapes.items() if key not in self._unusable},
        )
        rewards = [self._rewards(name) for name in self.episodes]
        self._success = dict(zip(self.episodes, judge_success(rewards), strict=True))
        if None in self._success.values():
            self.notes.append("rewards do not mark success; every episode counts as a demonstration that succeeded")

    def _rate(self, env: Mapping[str, Any]) -> float:
        given = env.get("env_kwargs", {}).get("control_freq") if isinstance(env.get("env_kwargs"), dict) else None
        if isinstance(given, int | float) and given > 0:
            return float(given)
        if env.get("type") == _ROBOSUITE_TYPE:
            return _ROBOSUITE_HZ
        raise DatasetError(
            f"{self.path}: 'env_args' has no env_kwargs.control_freq, so the control rate is unknown. Give it with "
            "--control-hz (steps per second of the environment that the data come from)."
        )

    def _demo(self, name: str) -> h5py.Group:
        demo = _own_group(self._file["data"], name, self.path)
        refuse_foreign_content(demo, self.path)
        return demo

    def _action_dim(self, demo: h5py.Group) -> int:
        actions = demo.get("actions")
        if not isinstance(actions, h5py.Dataset) or actions.ndim != 2:
            raise DatasetError(f"{self.path}: '{demo.name}/actions' is missing or not of shape (steps, dimensions).")
        return int(actions.shape[1])

    def _scale(self, key: str) -> float:
        if key not in self._scales:
            self._scales[key] = pixel_scale(self._readable(key))
        return self._scales[key]

    def _readable(self, key: str) -> Iterator[np.ndarray]:
        """Values of an observation, demo by demo, as far as they are not damaged."""
        for name in self.episodes:
            with contextlib.suppress(DatasetError, *_DAMAGE):
                dataset = self._demo(name)[f"obs/{key}"]
                require_size(dataset.nbytes, f"{self.path}: '{dataset.name}'")
                yield dataset[()]

    def _rewards(self, name: str) -> np.ndarray:
        demo = self._demo(name)
        rewards = demo.get("rewards")
        if not isinstance(rewards, h5py.Dataset) or rewards.size != len(demo["actions"]):
            return np.empty(0)
        return rewards[()].reshape(-1)

    def _read_masks(self) -> dict[str, list[str]]:
        masks: dict[str, list[str]] = {}
        if "mask" not in self._file:
            return masks
        group = _own_group(self._file, "mask", self.path)
        for key in group:
            members = group.get(key) if isinstance(group.get(key, getlink=True), h5py.HardLink) else None
            if not isinstance(members, h5py.Dataset) or members.dtype.kind not in "SO" or members.ndim != 1:
                raise DatasetError(f"{self.path}: 'mask/{key}' is not a list of demo names.")
            require_size(members.nbytes, f"{self.path}: 'mask/{key}'", LARGEST_JSON_BYTES)
            masks[key] = [value.decode() if isinstance(value, bytes) else str(value) for value in members[()]]
        return masks

    def read(self, episode: str) -> tuple[Arrays, EpisodeInfo]:
        """See :class:`~simtoreal.data_collection.exchange.Reader`."""
        where = f"{self.path}: 'data/{episode}'"
        try:
            demo = self._demo(episode)
            total = sum(value.nbytes for value in _datasets(demo).values())
            require_size(total, where)
            if self._own:
                arrays = {
                    name: demo[name][()] for name in array_names(demo) if name.split("/")[0] not in _DERIVED_GROUPS
                }
                text = str(demo.attrs["episode"])
                return arrays, EpisodeInfo.from_json(text, path=self.path, steps=len(arrays["actions"]))
            return self._read_foreign(episode, demo, where)
        except _DAMAGE as error:
            raise DatasetError(f"{where}: reading failed, the file is damaged ({error}).") from error

    def _read_foreign(self, episode: str, demo: h5py.Group, where: str) -> tuple[Arrays, EpisodeInfo]:
        steps = len(demo["actions"])
        arrays: Arrays = {
            "actions": demo["actions"][()].astype(np.float32),
            "rewards": np.zeros(steps, np.float32),
            "dones": np.zeros(steps, np.int8),
            "states": np.empty((steps, 0)),
        }
        constants: dict[str, Any] = {}
        for name, dataset in _datasets(demo).items():
            head, _, key = name.partition("/")
            if name in ("rewards", "dones", "states"):
                if name != "states" and dataset.size != steps:
                    raise DatasetError(f"{where}: '{name}' has shape {dataset.shape}; expected a number per step.")
                values = dataset[()].astype(arrays[name].dtype)
                arrays[name] = values if name == "states" else values.reshape(steps)  # some programs write (steps, 1)
            elif head == "obs" and key in self._names and key not in self._unusable:
                own = self._names[key]
                values = dataset[()]
                image = own.endswith(IMAGE_SUFFIX)
                shown = f"{where} '{name}'"
                arrays[f"obs/{own}"] = to_image(values, shown, self._scale(key)) if image else single_precision(values)
            elif name != "actions" and head not in ("obs", "next_obs"):
                # Extras per step (robomimic 0.5: actions_abs, action_dict) stay with them, others with the episode.
                if dataset.ndim and len(dataset) == steps:
                    arrays[self._extra_name(name)] = dataset[()]
                elif dataset.size <= _LARGEST_CONSTANT and np.isfinite(values := dataset[()]).all():
                    constants[name] = values.tolist()
                else:
                    self._note(f"left out '{name}', which is too large or not finite")
            elif head == "obs" and key not in self._names:
                self._note(f"left out observation '{key}', which the first demo does not have")
        missing = [key for key in self._names if key not in self._unusable and f"obs/{key}" not in demo]
        if missing:
            raise DatasetError(f"{where} has no 'obs/{missing[0]}', which other demos have.")
        success = self._success[episode]
        model = demo.attrs.get("model_file")
        extra: dict[str, Any] = {
            "imported_from": self.path.name,
            "source_episode": episode,
            **({"constants": constants} if constants else {}),
        }
        if success is None:
            extra["success_assumed"] = True
        if model is not None and len(str(model)) < LARGEST_JSON_BYTES:
            extra["model_file"] = str(model)
        info = EpisodeInfo(
            task=self._task,
            seed=int(episode[5:]),
            success=success is not False,
            failure="unknown" if success is False else "",
            operator=self.path.stem,
            source="robomimic",
            embodiment=embodiment_digest(self.embodiment),
            instructions=("",),
            duration_s=steps * self.embodiment.control_period_s,
            extra=extra,
        )
        return arrays, info

    def _extra_name(self, name: str) -> str:
        """Where an array per step that robomimic does not know is kept, the same in every demo."""
        if name not in self._extras:
            plain = name.replace("/", "_")
            self._extras[name] = step_name(plain, self._extras.values())
            if self._extras[name] != f"step/{plain}":
                self._note(f"'{name}' is called '{self._extras[name]}' here")
        return self._extras[name]

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def _datasets(group: h5py.Group) -> dict[str, h5py.Dataset]:
    return {name: group[name] for name in array_names(group)}


def _own_group(parent: h5py.Group, name: str, path: Path) -> h5py.Group:
    """Return a group that is really inside the file.

    Raises:
        DatasetError: it is missing, a link, or not a group.
    """
    link = parent.get(name, getlink=True)
    where = f"{path}: '{parent.name.rstrip('/')}/{name}'"
    if link is None:
        raise DatasetError(f"{where} is missing; not a robomimic file.")
    if not isinstance(link, h5py.HardLink):
        raise DatasetError(
            f"{where} is a link to elsewhere; links are refused. If this is the dataset.hdf5 of a simtoreal dataset, "
            "use its folder, or 'simtoreal data export --format robomimic' to make a file that stands alone."
        )
    group = parent.get(name)
    if not isinstance(group, h5py.Group):
        raise DatasetError(f"{where} is not a group; not a robomimic file.")
    return group

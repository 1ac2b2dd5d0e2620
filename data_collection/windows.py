"""Windows of observations and actions for training, gathered from memory without a Python loop over samples."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, disk_errors, open_episode, read_episode
from simtoreal.data_collection.scene_frame import relate_to_scene
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.files import atomic_path

CACHE = ".window_cache"
# Joined files that no training has opened for so long are removed; one that still maps them keeps their content.
CACHE_KEPT_S = 7 * 24 * 3600.0


class WindowSampler:
    """Every window of a set of episodes, by index.

    The window at time t of an episode of T steps holds the observations t - n_obs + 1 … t, the first one repeated
    before the start, and the actions t … t + horizon - 1, the last one repeated after the end and masked. There is
    one window per control step. Episodes lie end to end in one array per key, so a batch is one gather per key.
    Steps that are not to be kept begin no window, and their actions are masked in the windows of others; they are
    still observed as history.

    Args:
        data: a dataset, or one dictionary of arrays per episode with keys as in an episode file
            (``"actions"``, ``"obs/proprio"``, …).
        episodes: which episodes of a dataset to use, e.g. ``dataset.filter("train")``; ignored for arrays.
        observation_steps: n_obs, at least 1.
        horizon: actions per window, at least 1.
        keys: observation keys without ``obs/``, e.g. ``("front_image", "wrist_image", "proprio")``.
        actions: array used as the action, e.g. ``"step/target"`` for absolute targets.
        keep: one (T,) bool array per episode, False at steps not to learn from; None keeps all.
        displacement: one (T, A) array per episode: how far the scene moved by itself during each step, in units of the
            actions, which are then related to the scene; see :mod:`simtoreal.data_collection.scene_frame`.
        memory_map: keep the joined arrays in files in ``.window_cache`` below the dataset instead of in memory, for
            datasets larger than it; the operating system then caches what is used. Files that were not opened for a
            week are removed.

    Raises:
        ConfigError: a size is below 1, there is no episode, or ``keep`` does not fit or keeps no step.
        DatasetError: an episode is damaged or lacks a key, or shapes differ between episodes.
    """

    def __init__(
        self,
        data: Dataset | Sequence[Arrays],
        episodes: Sequence[EpisodeInfo] | None = None,
        observation_steps: int = 1,
        horizon: int = 1,
        keys: Sequence[str] = (),
        *,
        actions: str = "actions",
        keep: Sequence[np.ndarray] | None = None,
        displacement: Sequence[np.ndarray] | None = None,
        memory_map: bool = False,
    ) -> None:
        if observation_steps < 1 or horizon < 1:
            raise ConfigError(f"observation_steps = {observation_steps} and horizon = {horizon} must be at least 1.")
        self.observation_steps, self.horizon, self.keys = observation_steps, horizon, tuple(keys)
        names = {**{key: f"obs/{key}" for key in self.keys}, "": actions}
        if isinstance(data, Dataset):
            chosen = list(data.episodes if episodes is None else episodes)
            lengths = [episode.steps for episode in chosen]
            self.instructions, self._instruction = _instructions(chosen)
            joined = _map_episodes(data.path, chosen, names) if memory_map else _join_episodes(chosen, names)
        else:
            lengths = [len(arrays[actions]) for arrays in data]
            self.instructions, self._instruction = [""], np.zeros(sum(lengths), dtype=np.int64)
            joined = {key: np.concatenate([arrays[name] for arrays in data]) for key, name in names.items() if data}
        if not lengths:
            raise ConfigError("there is no episode to draw windows from.")
        self.actions = np.ascontiguousarray(joined.pop(""), dtype=np.float32)
        if displacement is not None:
            self.actions = relate_to_scene(self.actions, displacement)
        self.observations = joined
        self.episode_starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        # Row t of the joined arrays belongs to the episode that covers rows `_first[t]` … `_last[t]`.
        episode = np.repeat(np.arange(len(lengths)), lengths)
        self._first = self.episode_starts[episode]
        self._last = self._first + np.asarray(lengths)[episode] - 1
        self._history = np.arange(1 - observation_steps, 1)
        self._future = np.arange(horizon)
        self.keep = _join_masks(keep, lengths)
        self._windows = np.flatnonzero(self.keep)
        # (W,) index of the episode of every window.
        self.episode_of_window = episode[self._windows]

    def __len__(self) -> int:
        """Number of windows, which is the number of control steps that are kept."""
        return len(self._windows)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Gather windows.

        Args:
            indices: (B,) integers in [0, len(self)).

        Returns:
            ``observation``: key -> (B, n_obs, ...) in the stored dtype (images uint8, proprio float32);
            ``actions`` (B, horizon, A) float32; ``action_mask`` (B, horizon) bool, False after the episode's
            end and at steps that are not kept; ``instruction``: list of B texts.

        Raises:
            IndexError: an index is out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or (len(indices) and (indices.min() < 0 or indices.max() >= len(self))):
            raise IndexError(f"window indices must be a vector of integers from 0 to {len(self) - 1}")
        rows = self._windows[indices]
        past = np.maximum(rows[:, None] + self._history, self._first[rows][:, None])
        last = self._last[rows][:, None]
        future = rows[:, None] + self._future
        clipped = np.minimum(future, last)
        taken = self.actions.take(clipped, axis=0)
        return {
            "observation": {key: array.take(past, axis=0) for key, array in self.observations.items()},
            "actions": taken,
            "action_mask": (future <= last) & self.keep[clipped],
            "instruction": [self.instructions[row] for row in self._instruction[rows]],
        }


def _join_masks(keep: Sequence[np.ndarray] | None, lengths: Sequence[int]) -> np.ndarray:
    """``(N,)`` bool: the rows to learn from."""
    if keep is None:
        return np.ones(sum(lengths), dtype=bool)
    if [len(mask) for mask in keep] != list(lengths):
        raise ConfigError("keep must hold one array per episode with one value per step.")
    joined = np.concatenate(keep).astype(bool)
    if not joined.any():
        raise ConfigError("no step of these episodes is kept; there is nothing to learn from.")
    return joined


def _instructions(episodes: Sequence[EpisodeInfo]) -> tuple[list[str], np.ndarray]:
    """Every distinct instruction, and for every row the index of the one in force."""
    texts: dict[str, int] = {}
    rows = []
    for episode in episodes:
        used = [texts.setdefault(text, len(texts)) for text in episode.instructions or (episode.instruction,)]
        index = np.zeros(episode.steps, dtype=np.int64)
        if len(used) > 1:
            index = read_episode(Path(str(episode.path)), ["step/instruction"])[1]["step/instruction"]
        rows.append(np.asarray(used)[index])
    return list(texts), np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


def _join_episodes(episodes: Sequence[EpisodeInfo], names: dict[str, str]) -> Arrays:
    """Read the arrays of all episodes into one array each, straight into their place."""
    joined: Arrays = {}
    _fill(episodes, names, joined, lambda key, shape, dtype: np.empty(shape, dtype))
    return joined


def _map_episodes(dataset: Path, episodes: Sequence[EpisodeInfo], names: dict[str, str]) -> Arrays:
    """As :func:`_join_episodes`, into files that are mapped, and reused while the episode files stay the same."""
    files = [Path(str(episode.path)) for episode in episodes]
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    digest = hashlib.sha256(json.dumps([stamp, sorted(names.values())]).encode()).hexdigest()[:16]
    folder = dataset / CACHE
    paths = {key: folder / f"{digest}-{name.replace('/', '-')}.npy" for key, name in names.items()}
    for key, path in paths.items():
        if path.exists():
            # Its owner, or a disk mounted for reading only, may not let us; then nothing is removed there either.
            with contextlib.suppress(OSError):
                os.utime(path)
        else:
            with disk_errors(path), atomic_path(path) as temporary:
                _fill(
                    episodes, {key: names[key]}, {},
                    lambda _, shape, dtype, to=temporary: _mapped_file(to, shape, dtype),
                )  # fmt: skip
    mapped = {key: np.load(path, mmap_mode="r", allow_pickle=False) for key, path in paths.items()}
    _drop_unused(folder, set(paths.values()))
    return mapped


def _mapped_file(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A new ``.npy`` file, mapped for writing, that has all of its place on the disk.

    Else a full disk is no error but the end of this process (SIGBUS), as soon as a page has nowhere to go.
    """
    mapped = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return mapped


def _drop_unused(folder: Path, used: set[Path]) -> None:
    """Remove the files of other episodes and keys, and of what was killed, that were not opened for long."""
    for path in set(folder.iterdir()) - used:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > CACHE_KEPT_S:
                path.unlink()


def _fill(episodes: Sequence[EpisodeInfo], names: dict[str, str], joined: Arrays, allocate: Any) -> None:
    total, row = sum(episode.steps for episode in episodes), 0
    # Before any episode is open: a full disk must not be taken for damage of the episode.
    types = _row_types(episodes[0], names) if episodes else {}
    for key, (shape, dtype) in types.items():
        joined[key] = allocate(key, (total, *shape), dtype)
    for episode in episodes:
        path = Path(str(episode.path))
        with open_episode(path) as file:
            for key, name in names.items():
                source = _array(file, name, path)
                target = joined[key][row : row + episode.steps]
                if source.shape != target.shape or source.dtype != target.dtype:
                    raise DatasetError(
                        f"{path}: '{name}' is {source.shape} {source.dtype}, expected {target.shape} {target.dtype} "
                        "as in the episodes before it."
                    )
                source.read_direct(target)
        row += episode.steps


def _row_types(episode: EpisodeInfo, names: dict[str, str]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Key -> shape of one step and type of its array in an episode."""
    path = Path(str(episode.path))
    with open_episode(path) as file:
        arrays = {key: _array(file, name, path) for key, name in names.items()}
        return {key: (array.shape[1:], array.dtype) for key, array in arrays.items()}


def _array(file: Any, name: str, path: Path) -> Any:
    if name not in file:
        raise DatasetError(f"{path}: has no '{name}'; it holds obs keys {', '.join(file['obs'])}.")
    return file[name]

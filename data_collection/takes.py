"""Where the steps of a running episode go until it is kept or discarded: memory, or a crash-safe ``.part`` file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np

from simtoreal.data_collection.episode import Arrays, EpisodeInfo, array_names, disk_errors, refuse_foreign_content
from simtoreal.envs.errors import DatasetError

Keep = Callable[[Arrays, EpisodeInfo], object]
"""Stores a finished episode."""

# Written and flushed last: a step exists once its action does, so a kill between two arrays leaves no torn step.
_COMMIT = "actions"
_ROWS_PER_CHUNK = 64


class EmptyPartError(DatasetError):
    """A ``.part`` file holds no complete step, so there is nothing to recover from it."""


class Take(Protocol):
    """A running episode."""

    def append(self, row: Arrays) -> None:
        """Add one control step; every row has the same names, shapes and dtypes."""

    def keep(self, info: EpisodeInfo) -> None:
        """End the episode and store it."""

    def discard(self) -> None:
        """End the episode and leave nothing behind."""


class MemoryTake:
    """Collects steps in arrays that double when full, and stores the whole episode at once."""

    def __init__(self, store: Keep, *, capacity: int = 128) -> None:
        self._store, self._capacity, self._steps = store, capacity, 0
        self._arrays: Arrays = {}

    def append(self, row: Arrays) -> None:
        """See :class:`Take`."""
        if not self._arrays:
            self._arrays = {name: np.empty((self._capacity, *value.shape), value.dtype) for name, value in row.items()}
        elif self._steps == self._capacity:
            self._capacity *= 2
            for name, old in self._arrays.items():
                self._arrays[name] = np.empty((self._capacity, *old.shape[1:]), old.dtype)
                self._arrays[name][: self._steps] = old
        for name, array in self._arrays.items():
            array[self._steps] = row[name]
        self._steps += 1

    def keep(self, info: EpisodeInfo) -> None:
        """See :class:`Take`."""
        self._store({name: array[: self._steps] for name, array in self._arrays.items()}, info)
        self.discard()

    def discard(self) -> None:
        """See :class:`Take`."""
        self._arrays, self._steps = {}, 0


class StreamTake:
    """Appends every step to an HDF5 file in SWMR mode and flushes it, so that SIGKILL loses no finished step.

    Single-writer-multiple-reader mode orders the writes of HDF5 such that the file is readable at any moment,
    which an ordinary HDF5 file is not before it is closed. See https://docs.hdfgroup.org, "SWMR".

    Args:
        part: path of the running file, e.g. ``episodes/000012.part``.
        store: receives the finished episode, which replaces the part.
        info: describes the episode should the writer be killed; stored with ``failure="aborted"`` by the caller.
    """

    def __init__(self, part: Path, store: Keep, info: EpisodeInfo) -> None:
        self._part, self._store, self._info = part, store, info
        self._file: h5py.File | None = None
        self._datasets: dict[str, h5py.Dataset] = {}
        self._steps = 0

    def append(self, row: Arrays) -> None:
        """See :class:`Take`.

        Raises:
            DatasetError: the disk is full; the steps before this one are safe in the part.
        """
        with disk_errors(self._part):
            if self._file is None:
                self._file = self._create(row)
            names = [name for name in self._datasets if name != _COMMIT]
            for name in [*names, _COMMIT]:
                dataset = self._datasets[name]
                dataset.resize(self._steps + 1, axis=0)
                dataset[self._steps] = row[name]
                dataset.flush()
        self._steps += 1

    def _create(self, row: Arrays) -> h5py.File:
        file = h5py.File(self._part, "w", libver="latest")
        for name, value in row.items():
            rows = 1 if value.ndim == 3 else _ROWS_PER_CHUNK
            # HDF5 refuses chunks of zero elements, as the state of a real robot would give.
            chunk = (rows, *(max(1, size) for size in value.shape))
            self._datasets[name] = file.create_dataset(
                name, (0, *value.shape), value.dtype, maxshape=(None, *value.shape), chunks=chunk
            )
        file.attrs["episode"] = self._info.to_json()
        file.swmr_mode = True
        return file

    def keep(self, info: EpisodeInfo) -> None:
        """See :class:`Take`."""
        self._close()
        _, arrays = read_part(self._part)
        self._store(arrays, info)
        self._part.unlink()

    def discard(self) -> None:
        """See :class:`Take`."""
        self._close()
        self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            # After a full disk closing fails too; what was flushed before is what recovery reads.
            with contextlib.suppress(OSError, RuntimeError):
                self._file.close()
        self._file, self._datasets, self._steps = None, {}, 0


def read_part(path: Path) -> tuple[EpisodeInfo, Arrays]:
    """Read every complete step of a ``.part`` file, also one whose writer was killed.

    Raises:
        EmptyPartError: it holds no complete step.
        DatasetError: it cannot be read.
    """
    try:
        with h5py.File(path, "r", libver="latest", swmr=True) as file:
            refuse_foreign_content(file, path)
            names = array_names(file)
            steps = min((file[name].shape[0] for name in names), default=0)
            arrays = {name: file[name][:steps] for name in names}
            text = str(file.attrs["episode"])
    except (OSError, KeyError, RuntimeError) as error:
        raise DatasetError(f"{path}: holds no readable step ({error}).") from error
    if steps == 0:
        raise EmptyPartError(f"{path}: holds no complete step.")
    return EpisodeInfo.from_json(text, path=path, steps=steps), arrays

"""Where the steps of a running episode go until it is kept or discarded: memory, or a crash-safe ``.part`` file."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simtoreal.data_collection.episode import Arrays, EpisodeInfo, disk_errors
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.files import append_whole

Keep = Callable[[Arrays, EpisodeInfo], object]
"""Stores a finished episode."""

_HEADER = {"format": "simtoreal-part", "version": 1}
_CRC = "crc32"


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
    """Appends every step to a journal with one write, so that SIGKILL at any moment loses no step appended before.

    The journal is a line of JSON (episode information, and name, type and shape of every array) followed by records
    of fixed size, each with a CRC-32. It becomes an ordinary episode when it is kept, or by :func:`read_part` after
    a crash. HDF5's own crash-safe mode (SWMR) was measured and left: once a write fails because the disk is full,
    libhdf5 can no longer close the file and crashes the process, which must not happen to one that moves a robot.

    Args:
        part: path of the journal, e.g. ``episodes/000012.part``; created with the first step.
        store: receives the finished episode, which replaces the journal.
        info: describes the episode should the writer be killed; the caller sets ``failure="aborted"``.
    """

    def __init__(self, part: Path, store: Keep, info: EpisodeInfo) -> None:
        self._part, self._store, self._info = part, store, info
        self._descriptor: int | None = None
        self._names: list[str] = []

    def append(self, row: Arrays) -> None:
        """See :class:`Take`.

        Raises:
            DatasetError: the disk is full; the steps before this one are safe in the journal.
        """
        with disk_errors(self._part):
            descriptor = self._begin(row) if self._descriptor is None else self._descriptor
            payload = b"".join(row[name].tobytes() for name in self._names)
            # All or nothing, so that what follows, if space is freed, stays aligned.
            append_whole(descriptor, payload + struct.pack("<I", zlib.crc32(payload)))

    def _begin(self, row: Arrays) -> int:
        self._names = list(row)
        fields = [[name, value.dtype.str, list(value.shape)] for name, value in row.items()]
        header = json.dumps({**_HEADER, "info": self._info.to_json(), "fields": fields}) + "\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._part, flags, 0o644)
        try:
            append_whole(self._descriptor, header.encode())
        except OSError:
            self.discard()
            raise
        return self._descriptor

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
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


def read_part(path: Path) -> tuple[EpisodeInfo, Arrays]:
    """Read every complete step of a journal, also one whose writer was killed.

    Raises:
        EmptyPartError: it holds no complete step.
        DatasetError: it is not a journal, or damaged before its last step.
    """
    header, newline, body = path.read_bytes().partition(b"\n")
    if not newline:
        raise EmptyPartError(f"{path}: holds no complete step.")
    try:
        content = json.loads(header)
        if {key: content[key] for key in _HEADER} != _HEADER:
            raise ValueError(f"expected a header with {_HEADER}")
        fields = [(str(name), _number_type(kind), tuple(map(int, shape))) for name, kind, shape in content["fields"]]
        record = np.dtype([*fields, (_CRC, "<u4")])
        info_text = str(content["info"])
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: is not the journal of a running episode ({error}).") from error
    steps = len(body) // record.itemsize
    if steps == 0:
        raise EmptyPartError(f"{path}: holds no complete step.")
    records = np.frombuffer(body, dtype=record, count=steps)
    for step in range(steps):
        row = body[step * record.itemsize : (step + 1) * record.itemsize - 4]
        if zlib.crc32(row) != records[_CRC][step]:
            raise DatasetError(f"{path}: step {step} of {steps} is damaged (its checksum differs).")
    arrays = {name: np.ascontiguousarray(records[name]) for name, _, _ in fields}
    return EpisodeInfo.from_json(info_text, path=path, steps=steps), arrays


def _number_type(text: str) -> np.dtype[Any]:
    kind = np.dtype(text)
    if kind.kind not in "iufb":
        raise ValueError(f"type '{text}' is not a number")
    return kind

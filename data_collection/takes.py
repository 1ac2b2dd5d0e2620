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

from simtoreal.data_collection.episode import Arrays, EpisodeInfo
from simtoreal.data_collection.journal import LIMIT_BYTES, PATIENCE_S, Journal
from simtoreal.envs.errors import DatasetError

Keep = Callable[[Arrays, EpisodeInfo], object]
"""Stores a finished episode."""

_HEADER = {"format": "simtoreal-part", "version": 2}
_CRC = "crc32"
# sequence number, bytes of JSON, CRC-32 of both and the JSON
_NOTE = struct.Struct("<III")
_NOTES = 2
_SMALLEST_NOTE = 4096
_LONGEST_HEAD = 2**20


class EmptyPartError(DatasetError):
    """A ``.part`` file holds no complete step, so there is nothing to recover from it."""


class Take(Protocol):
    """A running episode.

    Attributes:
        recoverable: flushed steps outlive this process and a failed :meth:`keep`.
    """

    recoverable: bool

    @property
    def flushed(self) -> int:
        """Steps that killing this process cannot lose any more."""

    @property
    def waiting(self) -> int:
        """Steps appended that are not flushed."""

    def append(self, row: Arrays) -> None:
        """Add one control step; every row has the same names, shapes and dtypes.

        Raises:
            DiskError: nothing more can be stored; :attr:`flushed` steps are.
        """

    def describe(self, info: EpisodeInfo) -> None:
        """Replace what will be known about the episode should it never be kept; never fails."""

    def finish(self) -> None:
        """Wait until every step is stored.

        Raises:
            DiskError: not every one is; :attr:`flushed` steps are.
        """

    def keep(self, info: EpisodeInfo) -> None:
        """End the episode and store its :attr:`flushed` steps (those appended, if :meth:`finish` did not fail).

        Raises:
            DatasetError: the episode is inconsistent, or the disk is full (:class:`DiskError`).
        """

    def discard(self) -> None:
        """End the episode and leave nothing behind."""


class MemoryTake:
    """Collects steps in arrays that double when full, and stores the whole episode at once."""

    recoverable = False

    def __init__(self, store: Keep, *, capacity: int = 128) -> None:
        self._store, self._capacity, self._steps = store, capacity, 0
        self._arrays: Arrays = {}

    @property
    def flushed(self) -> int:
        """See :class:`Take`."""
        return 0

    @property
    def waiting(self) -> int:
        """See :class:`Take`."""
        return self._steps

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

    def describe(self, info: EpisodeInfo) -> None:
        """See :class:`Take`."""

    def finish(self) -> None:
        """See :class:`Take`."""

    def keep(self, info: EpisodeInfo) -> None:
        """See :class:`Take`."""
        self._store({name: array[: self._steps] for name, array in self._arrays.items()}, info)
        self.discard()

    def discard(self) -> None:
        """See :class:`Take`."""
        self._arrays, self._steps = {}, 0


class StreamTake:
    """Writes every step to a journal at once, so that SIGKILL at any moment loses no flushed step.

    The file is a line of JSON (name, type and shape of every array), two notes (see below), and one record of fixed
    size with a CRC-32 per step. It becomes an ordinary episode when it is kept, or by :func:`read_part` after a crash.
    HDF5's own crash-safe mode (SWMR) was measured and left: once a write fails because the disk is full, libhdf5 can
    no longer close the file and crashes the process, which must not happen to one that moves a robot.

    The notes hold what is known about the episode (:meth:`describe`). They are written in turns and numbered, so that
    a kill in the middle of one leaves the other, and have their place reserved, so that they can still be written
    when the disk is full.

    Args:
        part: path of the journal, e.g. ``episodes/000012.part``; created with the first step.
        store: receives the finished episode, which replaces the journal.
        info: describes the episode should the writer be killed; the caller sets ``failure="aborted"``.
        patience_s, limit_bytes: see :class:`~simtoreal.data_collection.journal.Journal`.
    """

    recoverable = True

    def __init__(
        self,
        part: Path,
        store: Keep,
        info: EpisodeInfo,
        *,
        patience_s: float = PATIENCE_S,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self._part, self._store, self._info = part, store, info
        self._journal = Journal(part, patience_s=patience_s, limit_bytes=limit_bytes)
        self._names: list[str] = []
        self._notes_at = self._note_bytes = self._notes = 0

    @property
    def flushed(self) -> int:
        """See :class:`Take`."""
        return self._journal.flushed

    @property
    def waiting(self) -> int:
        """See :class:`Take`."""
        return self._journal.waiting

    def append(self, row: Arrays) -> None:
        """See :class:`Take`."""
        head = b"" if self._names else self._head(row)
        payload = b"".join(row[name].tobytes() for name in self._names)
        self._journal.append(head + payload + struct.pack("<I", zlib.crc32(payload)))

    def _head(self, row: Arrays) -> bytes:
        self._names = list(row)
        fields = [[name, value.dtype.str, list(value.shape)] for name, value in row.items()]
        # Room for what is learned during the episode (instructions, why it ended).
        self._note_bytes = max(_SMALLEST_NOTE, 2 * len(self._info.to_json()))
        line = json.dumps({**_HEADER, "note_bytes": self._note_bytes, "fields": fields}).encode() + b"\n"
        self._notes_at, self._notes = len(line), 1
        return line + _note(1, self._info, self._note_bytes) + bytes(self._note_bytes)

    def describe(self, info: EpisodeInfo) -> None:
        """See :class:`Take`; what is larger than the place reserved for it is not noted."""
        self._info = info
        if self._names and (note := _note(self._notes + 1, info, self._note_bytes)):
            self._journal.rewrite(self._notes_at + self._notes % _NOTES * self._note_bytes, note)
            self._notes += 1

    def finish(self) -> None:
        """See :class:`Take`."""
        self._journal.drain()

    def keep(self, info: EpisodeInfo) -> None:
        """See :class:`Take`; the journal stays if the episode cannot be stored."""
        self._journal.close()
        if not self.flushed:
            raise DatasetError(f"{self._part}: the episode holds no steps; it needs at least one.")
        _, arrays = read_part(self._part)
        self._store(arrays, info)
        self._part.unlink()

    def discard(self) -> None:
        """See :class:`Take`."""
        self._journal.discard()


def _note(number: int, info: EpisodeInfo, size: int) -> bytes:
    """A note of exactly ``size`` bytes, or nothing if it does not fit."""
    text = info.to_json().encode()
    head = struct.pack("<II", number, len(text))
    note = head + struct.pack("<I", zlib.crc32(head + text)) + text
    return note.ljust(size, b"\0") if len(note) <= size else b""


def _newest_note(body: bytes, size: int) -> str | None:
    """Text of the newest complete note at the beginning of ``body``."""
    newest = 0, b""
    for index in range(_NOTES):
        note = body[index * size : (index + 1) * size]
        number, length, checksum = _NOTE.unpack_from(note)
        text = note[_NOTE.size : _NOTE.size + length]
        if number > newest[0] and len(text) == length and zlib.crc32(note[:8] + text) == checksum:
            newest = number, text
    return newest[1].decode() if newest[0] else None


def read_part(path: Path) -> tuple[EpisodeInfo, Arrays]:
    """Read every complete step of a journal, also one whose writer was killed.

    Raises:
        EmptyPartError: it holds no complete step.
        DatasetError: it is not a journal, or damaged before its last step.
    """
    with open(path, "rb") as file:
        line = file.readline(_LONGEST_HEAD)
        if not line.endswith(b"\n") and len(line) < _LONGEST_HEAD:
            raise EmptyPartError(f"{path}: holds no complete step.")
        record, size = _read_head(line, path)
        notes = file.read(_NOTES * size)
        steps = (os.fstat(file.fileno()).st_size - len(line) - _NOTES * size) // record.itemsize
        if steps <= 0:
            raise EmptyPartError(f"{path}: holds no complete step.")
        text = _newest_note(notes, size)
        if text is None:
            raise DatasetError(f"{path}: what is known about the episode is damaged (its checksum differs).")
        # Step by step, because a minute of two 640x480 cameras is gigabytes: they are in memory once.
        names = [name for name in record.names or () if name != _CRC]
        arrays = {name: np.empty((steps, *record[name].shape), record[name].base) for name in names}
        for step in range(steps):
            row = file.read(record.itemsize)
            values = np.frombuffer(row, dtype=record)[0] if len(row) == record.itemsize else None
            if values is None or zlib.crc32(row[:-4]) != values[_CRC]:
                raise DatasetError(f"{path}: step {step} of {steps} is damaged (its checksum differs).")
            for name, array in arrays.items():
                array[step] = values[name]
    return EpisodeInfo.from_json(text, path=path, steps=steps), arrays


def _read_head(line: bytes, path: Path) -> tuple[np.dtype[Any], int]:
    """Type of a record, which names every array, and the bytes of a note."""
    try:
        content = json.loads(line)
        if {key: content[key] for key in _HEADER} != _HEADER:
            raise ValueError(f"expected a header with {_HEADER}")
        fields = [(str(name), _number_type(kind), tuple(map(int, shape))) for name, kind, shape in content["fields"]]
        size = int(content["note_bytes"])
        if size < _SMALLEST_NOTE:
            raise ValueError(f"notes of {size} bytes")
        record = np.dtype([*fields, (_CRC, "<u4")])
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: is not the journal of a running episode ({error}).") from error
    return record, size


def _number_type(text: str) -> np.dtype[Any]:
    kind = np.dtype(text)
    if kind.kind not in "iufb":
        raise ValueError(f"type '{text}' is not a number")
    return kind

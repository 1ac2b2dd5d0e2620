"""A file that grows by whole records, written by a thread of its own so that a slow disk does not stop a robot."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from pathlib import Path

from simtoreal.envs.errors import DiskError
from simtoreal.envs.files import append_whole, explained_disk_errors

# A healthy disk takes a record in a tenth of a millisecond; a control loop at 20 Hz has this much to spare.
PATIENCE_S = 0.005
# What may wait in memory while the disk is stalled: at 64 pixels 2 minutes, at 640x480 and two cameras 1.7 s.
LIMIT_BYTES = 64 * 2**20


class Journal:
    """Appends records in order; each is in the file as a whole or not at all.

    :meth:`append` normally returns with the record in the file. If the disk stalls it returns after ``patience_s``
    all the same; the record then waits in memory, and is lost if the process is killed before the disk goes on.
    :attr:`flushed` counts what cannot be lost any more by killing the process. (A power cut is another matter: nothing
    here calls ``fsync``, which takes up to seconds; finished episodes are synced.)

    After the first failure nothing more is appended: a journal has no gaps.

    Args:
        path: created with the first record; must not exist.
        patience_s: how long :meth:`append` waits for the disk, seconds.
        limit_bytes: how much may wait in memory.
    """

    def __init__(self, path: Path, *, patience_s: float = PATIENCE_S, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path = path
        self._patience_s, self._limit_bytes = patience_s, limit_bytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int | None, bytes]] = deque()
        self._waiting_bytes = self._appended = self._flushed = 0
        self._busy = self._closing = False
        self._error: DiskError | None = None
        self._thread: threading.Thread | None = None

    @property
    def flushed(self) -> int:
        """Records in the file."""
        return self._flushed

    @property
    def waiting(self) -> int:
        """Records that were appended and are not in the file (yet, or never, after a failure)."""
        return self._appended - self._flushed

    def append(self, record: bytes) -> None:
        """Add a record.

        Raises:
            DiskError: this record or one before it could not be written, or more than ``limit_bytes`` are waiting.
        """
        with self._changed:
            if self._error is None and self._waiting_bytes + len(record) > self._limit_bytes:
                self._error = DiskError(
                    f"{self.path}: the disk does not keep up, {self._waiting_bytes / 1e6:.0f} MB are waiting. "
                    "Record to a faster disk, with smaller images or a lower rate."
                )
                self._drop()
            if self._error is not None:
                raise self._error
            stalled = self._appended > self._flushed
            self._appended += 1
            number = self._appended
            self._enqueue(None, record)
            # Waiting again for a disk that is known to stall would only cost the loop its time at every step.
            if not stalled:
                self._changed.wait_for(lambda: self._flushed >= number or self._error is not None, self._patience_s)
            if self._error is not None:
                raise self._error

    def rewrite(self, offset: int, content: bytes) -> None:
        """Replace bytes that exist already, in order with the appended records, also after a failure.

        Overwriting needs no space on ordinary file systems; where it fails nevertheless, the old bytes stay.
        """
        with self._changed:
            self._enqueue(offset, content)

    def drain(self) -> None:
        """Wait until every record is in the file, however slow the disk.

        Raises:
            DiskError: one could not be written.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """Write what is waiting and end the thread; may be called twice."""
        self._end()

    def discard(self) -> None:
        """Forget what is waiting and remove the file."""
        with self._changed:
            self._drop()
            self._waiting.clear()
        self._end()
        if self._flushed:
            self.path.unlink(missing_ok=True)

    def _enqueue(self, offset: int | None, content: bytes) -> None:
        if self._thread is None:
            # A daemon, because an interpreter that ends must not wait for a stalled disk.
            self._thread = threading.Thread(target=self._run, name=f"journal-{self.path.stem}", daemon=True)
            self._thread.start()
        self._waiting.append((offset, content))
        self._waiting_bytes += len(content)
        self._changed.notify_all()

    def _drop(self) -> None:
        """Take out the records that will not be written; rewriting goes on."""
        kept = [item for item in self._waiting if item[0] is not None]
        self._waiting.clear()
        self._waiting.extend(kept)
        self._waiting_bytes = sum(len(content) for _, content in kept)

    def _end(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        descriptor: int | None = None
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
                    if not self._waiting:
                        return
                    offset, content = self._waiting.popleft()
                    self._waiting_bytes -= len(content)
                    self._busy = True
                if offset is None:
                    descriptor = self._write(descriptor, content)
                elif descriptor is not None:
                    with contextlib.suppress(OSError):
                        _overwrite(self.path, offset, content)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _write(self, descriptor: int | None, content: bytes) -> int | None:
        try:
            with explained_disk_errors(self.path, DiskError, "The steps before are safe."):
                if descriptor is None:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
                    descriptor = os.open(self.path, flags, 0o644)
                append_whole(descriptor, content)
        except DiskError as error:
            with self._changed:
                self._error = error
                self._drop()
            if descriptor is not None and self._flushed == 0:
                # Without its first record the file describes nothing.
                os.close(descriptor)
                self.path.unlink(missing_ok=True)
                return None
            return descriptor
        with self._changed:
            # A record that was in the disk's hands when the queue overflowed is in the file all the same.
            self._flushed += 1
        return descriptor


def _overwrite(path: Path, offset: int, content: bytes) -> None:
    # On a descriptor with O_APPEND Linux appends whatever the offset says (pwrite(2), bugs).
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, content, offset)
    finally:
        os.close(descriptor)

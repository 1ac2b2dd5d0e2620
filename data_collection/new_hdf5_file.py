"""A file that HDF5 writes into without hearing of a full disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


class NewHdf5File(io.RawIOBase):
    """A new file for HDF5 to write, which hears of no error of the disk: those are for :meth:`check`.

    HDF5 crashes the process, if not at once then at its end, when it cannot write a file that it closes.

    Args:
        path: created, or emptied if it exists.
    """

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "w+")
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first error of the disk, if there was one."""
        if self._error is not None:
            raise self._error

    def write(self, content: Any) -> int:
        rest = memoryview(content)
        try:
            while rest and self._error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return self.tell() if size is None else size

    def readinto(self, buffer: Any) -> int:
        """Read what was written, and zeros where nothing could be."""
        read = self._file.readinto(buffer)
        memoryview(buffer)[read:] = bytes(len(buffer) - read)
        return len(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()

"""Files that are never half-written: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simtoreal.envs.errors import SimtorealError

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What another place or other permissions would cure.
UNUSABLE_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` durably, on error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # what the user knows
        raise
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append_whole(descriptor: int, content: bytes) -> None:
    """Append to a file opened with ``O_APPEND``: all of ``content``, or nothing if the disk is full."""
    end, written = os.fstat(descriptor).st_size, 0
    try:
        while written < len(content):
            written += os.write(descriptor, content[written:])
    except OSError:
        # Not every file can be cut (a device); the reason must not be hidden by that.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


@contextlib.contextmanager
def explained_disk_errors(path: Path, kind: type[SimtorealError], safe: str) -> Iterator[None]:
    """Turn a full or failing disk while writing ``path`` into an error for the user.

    Args:
        path: named in the message.
        kind: of the error.
        safe: what is safe and how to go on, whole sentences.
    """
    try:
        yield
    except OSError as error:
        if error.errno in UNUSABLE_ERRNOS:
            raise kind(describe_disk_error(error, path)) from error
        raise kind(f"{describe_disk_error(error, path)} {safe}") from error


def describe_disk_error(error: OSError, path: Path | str) -> str:
    """Return what is wrong with ``path`` for the user, in whole sentences."""
    if error.errno in DISK_FULL_ERRNOS:
        return f"{path}: the disk is full (or a quota or file-size limit was reached): {error}."
    if error.errno in UNUSABLE_ERRNOS:
        return f"{path}: cannot be written ({error.strerror}). Choose another place, or change what is in the way."
    return f"{path}: writing failed: {error}."


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically; NaN is refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text)

"""Writes a dataset folder: one process at a time, every file atomic, and the derived files rebuilt at will."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from simtoreal.data_collection.dataset import (
    EPISODES,
    FORMAT,
    FORMAT_VERSION,
    META,
    Dataset,
    episode_files,
    read_meta,
)
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, disk_errors, embodiment_digest, write_episode
from simtoreal.data_collection.statistics import dataset_statistics
from simtoreal.data_collection.view import write_view
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.files import fsync_folder, write_json
from simtoreal.envs.provenance import git_commit, versions

LOCK = ".lock"
"""File in a dataset that its writer holds locked."""
DAMAGED = "damaged"
"""Folder in a dataset with the files that ``data recover`` has set aside."""
UNFINISHED = ".unfinished"
"""Ending of a dataset folder that :func:`new_dataset` is still writing, or was when its process was killed."""


class DatasetWriter:
    """Holds a dataset folder open for writing and numbers its episodes.

    Use as a context manager; leaving it rebuilds ``meta.json`` and ``dataset.hdf5``. A killed writer leaves complete
    episodes, which the next one continues.

    Args:
        path: folder, created if it does not exist.
        embodiment: of everything that will be added.
        tasks: task name -> specification (plain, JSON-compatible).
        collection: how the data are made, for :func:`simtoreal.data_collection.collect.collect` to compare on resume.
        lock: of :func:`lock_folder`, if the caller has it already; it is closed by :meth:`release`.

    Raises:
        DatasetError: another process writes the folder, or a task has another specification there.
        EmbodimentMismatchError: the folder holds data of another embodiment.
    """

    def __init__(
        self,
        path: str | Path,
        embodiment: Embodiment,
        tasks: Mapping[str, Mapping[str, Any]],
        *,
        collection: Mapping[str, Any] | None = None,
        lock: Any = None,
    ) -> None:
        self.path, self.embodiment = Path(path), embodiment
        self._lock = lock_folder(self.path) if lock is None else lock
        try:
            meta = self._describe(dict(tasks), collection)
        except BaseException:
            self._lock.close()
            raise
        _clear_temporaries(self.path)
        listed = meta.get("episodes", {})
        self._next = _after(self.path, "hdf5", listed if isinstance(listed, dict) else {})
        self._next_part = max(self._next, _after(self.path, "part"))

    def _describe(self, tasks: dict[str, Any], collection: Mapping[str, Any] | None) -> dict[str, Any]:
        tasks = json.loads(json.dumps(tasks))
        (self.path / EPISODES).mkdir(parents=True, exist_ok=True)
        if (self.path / META).exists():
            meta = read_meta(self.path)
            Embodiment.from_dict(meta["embodiment"]).require_equal(
                self.embodiment, f"dataset {self.path}", "the data to be added"
            )
            for name, task in tasks.items():
                if meta["tasks"].get(name, task) != task:
                    raise DatasetError(
                        f"{self.path}: holds episodes of another specification of task '{name}'. Write to a new folder."
                    )
        else:
            if episode_files(self.path):
                raise DatasetError(f"{self.path}: has episodes but no {META}; restore it or write to a new folder.")
            meta = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "embodiment": self.embodiment.to_dict(),
                "embodiment_digest": embodiment_digest(self.embodiment),
                "tasks": {},
                "created_with": {"commit": git_commit(), "versions": versions()},
                "episodes": {},
                "masks": {},
                "statistics": {},
            }
        meta["tasks"] = {**meta["tasks"], **tasks}
        if collection is not None:
            meta["collection"] = dict(collection)
        with disk_errors(self.path / META):
            write_json(self.path / META, meta)
        return meta

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # Rebuilding needs space and readable files; the reason we leave must not be hidden by its failure.
            with contextlib.suppress(DatasetError):
                rebuild(self.path)
            self.release()

    def next_path(self) -> Path:
        """Path for the next episode file; every call returns another one."""
        path = self.path / EPISODES / f"{self._next:06d}.hdf5"
        self._next += 1
        return path

    def add(self, arrays: Arrays, info: EpisodeInfo) -> Path:
        """Write an episode and return its path.

        Raises:
            DatasetError: the episode is inconsistent, or the disk is full.
        """
        path = self.next_path()
        try:
            write_episode(path, arrays, info)
        except DatasetError:
            self._next -= 1
            raise
        return path

    def adopt(self, file: Path) -> Path:
        """Move a finished episode file of the same file system into the dataset and return its new path."""
        path = self.next_path()
        with disk_errors(path):
            os.replace(file, path)
            fsync_folder(path.parent)
        return path

    def part_path(self) -> Path:
        """Path for a running episode's ``.part`` file; every call returns another one.

        See :class:`~simtoreal.data_collection.takes.StreamTake`.
        """
        path = self.path / EPISODES / f"{self._next_part:06d}.part"
        self._next_part += 1
        return path

    def close(self) -> None:
        """Rebuild the derived files and let other processes write."""
        try:
            rebuild(self.path)
        finally:
            self.release()

    def release(self) -> None:
        """Let other processes write, without rebuilding."""
        self._lock.close()


def require_dataset_folder(path: Path) -> None:
    """Refuse to make a dataset of a folder that holds something else; call it before anything is created there.

    Args:
        path: a dataset, an empty folder, or nothing yet. A folder whose writer was killed before it wrote ``meta.json``
            counts as empty.

    Raises:
        DatasetError: names what the folder holds.
    """
    if not path.is_dir() or (path / META).exists():
        return
    with disk_errors(path):
        held = sorted(entry.name for entry in path.iterdir())
    if other := [name for name in held if name not in (LOCK, EPISODES) and not _is_temporary(name)]:
        raise DatasetError(
            f"{path}: is neither a dataset nor empty (it holds {', '.join(other[:3])}{', ...' if other[3:] else ''}). "
            "Choose a new folder."
        )


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _clear_temporaries(path: Path) -> None:
    """Remove what a killed writer had not renamed yet; whoever calls holds the lock, so nobody is writing."""
    for folder in (path, path / EPISODES):
        for file in folder.glob(".*.tmp"):
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def new_dataset(
    output: Path, embodiment: Embodiment, tasks: Mapping[str, Mapping[str, Any]]
) -> Iterator[DatasetWriter]:
    """Write a dataset that is at ``output`` when it is complete, and nowhere if anything goes wrong.

    Until then it is beside it, with the ending :data:`UNFINISHED`; there a killed process leaves it, and the next call
    removes it.

    Args:
        output: folder of the dataset, which does not exist or is empty.
        embodiment, tasks: see :class:`DatasetWriter`, which is yielded.

    Raises:
        DatasetError: ``output`` holds something, another process is writing it, or the disk is full.
    """
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DatasetError(f"{output}: already exists and is not an empty folder. Choose a new folder.")
    folder = output.with_name(f"{output.name}{UNFINISHED}")
    # Held until the folder has its name or is gone: the same command, started twice, must not clear away or fill what
    # the other one is writing.
    with contextlib.closing(lock_folder(folder)) as lock:
        try:
            with disk_errors(folder):
                for left in folder.iterdir():
                    if left.name == LOCK:
                        continue
                    if left.is_dir() and not left.is_symlink():
                        shutil.rmtree(left)
                    else:
                        left.unlink()
            yield DatasetWriter(folder, embodiment, tasks, lock=lock)
            rebuild(folder)
            with disk_errors(output):
                os.replace(folder, output)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    with disk_errors(output):
        fsync_folder(output.parent)


def _after(path: Path, suffix: str, listed: Iterable[str] = ()) -> int:
    """First number above those of the existing files, of those set aside, and of the episodes that are ``listed``.

    A number that was another episode's must not come back: masks and filters would take the new episode for it.
    """
    files = [*(path / EPISODES).glob(f"*.{suffix}"), *(path / DAMAGED).glob("*")]
    numbers = [name.partition(".")[0] for name in (*(file.name for file in files), *listed)]
    return max((int(number) for number in numbers if number.isascii() and number.isdecimal()), default=-1) + 1


def lock_folder(path: Path) -> Any:
    """Take the folder's write lock, which the kernel releases when this process ends in whatever way.

    Raises:
        DatasetError: another process holds it.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = open(path / LOCK, "a")  # noqa: SIM115 - lives as long as the lock
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise DatasetError(
            f"{path}: is being written by another process. Wait for it or choose another folder."
        ) from error
    return handle


def rebuild(path: Path) -> Dataset:
    """Write ``meta.json``'s episode list and statistics and the robomimic view anew from ``episodes/``.

    Raises:
        DatasetError: an episode is damaged, or the disk is full.
    """
    dataset = Dataset.open(path)
    meta = {
        **dataset.meta,
        "episodes": {episode.name: episode.steps for episode in dataset.episodes},
        "statistics": dataset_statistics(dataset),
    }
    with disk_errors(path / META):
        write_json(path / META, meta)
    dataset.meta = meta
    write_view(dataset)
    return dataset

"""One demonstration in one HDF5 file: written atomically, read without trusting it.

Layout of an episode of T control steps (paths inside the file):

====================  ==================  =======================================================
``actions``           (T, A) float32      action taken at step t
``rewards``           (T,) float32        reward of step t
``dones``             (T,) int8           1 where the task ended at step t, in success or by its failure
``states``            (T, D) float64      simulation state before action t (D = 0 on hardware)
``obs/<key>``         (T, ...)            observation before action t; images uint8 (T, H, W, 3) RGB
``step/target``       (T, 10) float64     absolute end-effector target after action t (``TARGET_NAMES``)
``step/timestamp_ns`` (T,) int64          monotonic (hardware) or simulated time of observation t
``step/capture_ns``   (T, S) int64        when each sensor measured what observation t shows (robots; monotonic)
``step/receive_ns``   (T, S) int64        when that arrived at this computer (robots; monotonic)
``step/scene_motion`` (T, K) float64      how the scene moved during step t (MOVE), by ``columns["scene_motion"]``
``step/<other>``      (T, ...)            contacts, milestones, instruction index, ...
====================  ==================  =======================================================

The attributes of the root group are ``num_samples`` = T, ``episode``, the JSON text of :class:`EpisodeInfo`, and
``crc32``, the JSON text of :func:`checksums`, which ``simtoreal data check`` compares.
Datasets of a finished file are contiguous and uncompressed: images of this size decompress slower than they
are read, and the root group is what robomimic expects below ``data/demo_<i>``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from simtoreal.data_collection.new_hdf5_file import NewHdf5File
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError, DiskError
from simtoreal.envs.files import atomic_path, explained_disk_errors

Arrays = dict[str, np.ndarray]
"""Arrays of an episode by their path inside the file, e.g. ``"obs/front_image"``."""

REQUIRED = ("actions", "rewards", "dones", "states")
ABORTED = "aborted"
CHECKSUMS = "crc32"

# Filters that ship with HDF5 itself; any other could load a plug-in library while reading.
_FILTERS = frozenset(
    {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
)
# Deflate cannot expand by more than 1032; a larger ratio is a dataset that was declared and never written.
_LARGEST_EXPANSION = 1100
_DEEPEST_GROUP = 3
_MOST_OBJECTS = 256


@dataclass(frozen=True, kw_only=True)
class EpisodeInfo:
    """What is known about an episode besides its arrays.

    Attributes:
        task: name of the task.
        seed: seed of the reset, which is also the id of the initial condition.
        success: whether the goal was reached (on hardware: judged by the operator).
        failure: empty on success; ``"timeout"``, ``"task_failed"``, ``"sim_fault"``, ``"aborted"`` (the writer ended),
            ``"unreviewed"`` (nobody accepted the take), ``"disk_full"``, ...
        operator: who acted, e.g. ``"expert"`` or a person's name.
        source: ``expert``, ``teleop``, ``policy``, ``twin`` or ``robot``.
        instruction: language instruction at the end of the episode.
        instructions: every instruction used, if it changed; ``step/instruction`` indexes it.
        embodiment: digest of the embodiment, see :func:`embodiment_digest`.
        milestones: name -> reached at any time.
        columns: names of the columns of two-dimensional ``step/`` arrays, e.g. ``{"contacts": (...)}``.
        started: UTC wall-clock time of the reset, ISO 8601.
        duration_s: simulated or real duration.
        commit, versions: what recorded it.
        extra: anything a method attaches (MOVE parameters, compatibility scores, ...), JSON-compatible; ``"sensors"``
            as in :mod:`~simtoreal.data_collection.sensor_health`, ``"lost_steps"`` of a partial episode.
        path: file it was read from; not stored.
        steps: number of control steps T; not stored here but as ``num_samples``.
    """

    task: str
    seed: int
    success: bool
    operator: str
    source: str
    embodiment: str
    instruction: str = ""
    failure: str = ""
    instructions: tuple[str, ...] = ()
    milestones: dict[str, bool] = field(default_factory=dict)
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    started: str = ""
    duration_s: float = 0.0
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    steps: int = 0

    @property
    def name(self) -> str:
        """Number of the episode in its dataset, as text of six digits."""
        return self.path.stem if self.path else ""

    def to_json(self) -> str:
        """JSON text stored in the attribute ``episode``.

        Raises:
            DatasetError: a field holds something that JSON cannot say, such as nan.
        """
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("path", "steps")}
        try:
            return json.dumps(content, allow_nan=False)
        except (ValueError, TypeError) as error:
            where = f"episode with seed {self.seed} of task '{self.task}'"
            raise DatasetError(f"{where}: what is known about it is no JSON ({error}).") from error

    @classmethod
    def from_json(cls, text: str, *, path: Path, steps: int) -> EpisodeInfo:
        """Inverse of :meth:`to_json`; fields of newer versions are kept in ``extra``.

        Raises:
            DatasetError: the text is not JSON, or a field is missing.
        """
        try:
            content = json.loads(text)
            known = {f.name for f in dataclasses.fields(cls)} - {"path", "steps"}
            fields = {key: value for key, value in content.items() if key in known}
            unknown = {key: value for key, value in content.items() if key not in known}
            fields["extra"] = {**fields.get("extra", {}), **unknown}
            fields["instructions"] = tuple(fields.get("instructions", ()))
            fields["columns"] = {key: tuple(names) for key, names in fields.get("columns", {}).items()}
            return cls(**fields, path=path, steps=steps)
        except (ValueError, TypeError, AttributeError) as error:
            raise DatasetError(f"{path}: attribute 'episode' is not the JSON of an episode ({error}).") from error


@functools.lru_cache(maxsize=64)
def embodiment_digest(embodiment: Embodiment) -> str:
    """Short stable hash of every field of an embodiment, stored in each episode."""
    text = json.dumps(embodiment.to_dict(), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or failing disk while writing ``path`` into a :class:`DiskError` that says what is safe."""
    safe = (
        "Nothing half-written is left and every finished episode is intact; "
        "free space and run the same command again to continue."
    )
    with explained_disk_errors(path, DiskError, safe):
        yield


def check_arrays(arrays: Arrays, where: str) -> int:
    """Return the number of steps T of an episode.

    Raises:
        DatasetError: a required array is missing, lengths differ, T is 0, or a float is not finite.
    """
    missing = [name for name in REQUIRED if name not in arrays]
    if missing or not any(name.startswith("obs/") for name in arrays):
        raise DatasetError(f"{where}: has no {', '.join(missing) or 'obs/<key>'}; expected {', '.join(REQUIRED)}, obs.")
    steps = len(arrays["actions"])
    if steps == 0:
        raise DatasetError(f"{where}: holds no steps; an episode needs at least one.")
    for name, array in arrays.items():
        if len(array) != steps:
            raise DatasetError(f"{where}: '{name}' has {len(array)} rows but 'actions' has {steps}; they must agree.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array.reshape(steps, -1)).all(axis=1))[0])
            raise DatasetError(f"{where}: '{name}' is not finite at step {row}; the episode cannot be used.")
    return steps


def write_episode(path: Path, arrays: Arrays, info: EpisodeInfo) -> None:
    """Write a whole episode atomically: after a crash at any moment the file is complete or absent.

    Raises:
        DatasetError: see :func:`check_arrays`; or the disk is full.
    """
    steps = check_arrays(arrays, str(path))
    text = info.to_json()
    with disk_errors(path), atomic_path(path) as temporary, contextlib.closing(NewHdf5File(temporary)) as target:
        with h5py.File(target, "w", libver="latest") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array)
            file.attrs["num_samples"] = steps
            file.attrs["episode"] = text
            file.attrs[CHECKSUMS] = json.dumps(checksums(arrays, text))
        target.check()


def checksums(arrays: Arrays, episode: str) -> dict[str, int]:
    """CRC-32 of every array's bytes, and under ``""`` of the JSON text of the episode: for damage, not for forgery."""
    sums = {
        name: zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data) for name, array in arrays.items()
    }
    return {**sums, "": zlib.crc32(episode.encode())}


def content_checksums(path: Path) -> dict[str, int]:
    """Checksums of the arrays of an episode file: equal where the same steps are, whatever is said about them.

    Files of an older version, which hold none, are read for them.

    Raises:
        DatasetError: see :func:`open_episode`.
    """
    with open_episode(path) as file:
        try:
            stored = json.loads(str(file.attrs[CHECKSUMS]))
            sums = {str(name): int(value) for name, value in stored.items()}
        except (KeyError, ValueError, TypeError, AttributeError):
            sums = checksums({name: file[name][()] for name in array_names(file)}, "")
    return {name: value for name, value in sums.items() if name}


@contextlib.contextmanager
def open_episode(path: Path) -> Iterator[h5py.File]:
    """Open a finished episode for reading after checking that nothing in it points outside the file.

    HDF5 resolves soft, external and virtual links and external storage silently, so that a crafted file can make
    the reader return any file of this machine. They are refused before any array is touched.

    Raises:
        DatasetError: missing, truncated, damaged or unsafe.
    """
    if path.is_symlink():
        raise DatasetError(
            f"{path}: is a symbolic link; a dataset holds plain files only. Copy or hard-link it instead."
        )
    if not path.is_file():
        raise DatasetError(f"{path}: does not exist. Restore it, or run 'simtoreal data recover' on its dataset.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be opened as HDF5, it is truncated or damaged ({error}). Restore it from a copy, or run "
            "'simtoreal data recover' on its dataset to set it aside."
        ) from error
    try:
        refuse_foreign_content(file, path)
        yield file
    except (OSError, KeyError, RuntimeError) as error:  # h5py raises any of them for damaged metadata
        raise DatasetError(f"{path}: reading failed, the file is damaged ({error}).") from error
    finally:
        file.close()


def refuse_foreign_content(file: h5py.File, path: Path) -> None:
    """Refuse links and storage outside the file, plug-in filters, references and implausible sizes.

    Raises:
        DatasetError: names the object and what it is.
    """
    objects = 0

    def walk(group: h5py.Group, depth: int) -> None:
        nonlocal objects
        if depth > _DEEPEST_GROUP:
            raise DatasetError(f"{path}: '{group.name}' is nested too deep; at most {_DEEPEST_GROUP} groups are used.")
        for name in group:
            objects += 1
            if objects > _MOST_OBJECTS:
                raise DatasetError(f"{path}: holds more than {_MOST_OBJECTS} objects; this is not an episode.")
            where = f"{path}: '{group.name.rstrip('/')}/{name}'"
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                kind = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
                raise DatasetError(f"{where} is {kind}. Episode files must be self-contained; links are refused.")
            child = group.get(name)
            if isinstance(child, h5py.Group):
                walk(child, depth + 1)
            elif isinstance(child, h5py.Dataset):
                _refuse_foreign_storage(child, where)
            else:
                raise DatasetError(f"{where} is a {type(child).__name__}; only groups and datasets are allowed.")

    walk(file, 0)


def _refuse_foreign_storage(dataset: h5py.Dataset, where: str) -> None:
    creation = dataset.id.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        raise DatasetError(
            f"{where} is a virtual dataset that reads other files. It is refused; store the data itself."
        )
    if creation.get_external_count():
        raise DatasetError(f"{where} keeps its data in an external file. It is refused; store the data itself.")
    filters = {creation.get_filter(index)[0] for index in range(creation.get_nfilters())}
    if filters - _FILTERS:
        raise DatasetError(f"{where} uses HDF5 filters {sorted(filters - _FILTERS)}; use gzip, lzf or none.")
    if dataset.dtype.kind not in "iufb":
        raise DatasetError(f"{where} has type {dataset.dtype}; expected numbers.")
    logical = dataset.size * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    if logical > _LARGEST_EXPANSION * stored:
        raise DatasetError(f"{where} declares {logical} bytes but stores {stored}; the file is damaged or hostile.")


def read_info(file: h5py.File, path: Path) -> EpisodeInfo:
    """Metadata of an open episode.

    Raises:
        DatasetError: attributes are missing or do not fit the arrays.
    """
    try:
        text, steps = file.attrs["episode"], int(file.attrs["num_samples"])
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path}: attributes 'num_samples' and 'episode' are missing; not our episode file."
        ) from error
    for name in REQUIRED:
        if not isinstance(file.get(name), h5py.Dataset) or file[name].shape[:1] != (steps,):
            raise DatasetError(f"{path}: '{name}' is missing or does not have num_samples = {steps} rows.")
    if not isinstance(file.get("obs"), h5py.Group) or not len(file["obs"]):
        raise DatasetError(f"{path}: holds no observations; expected datasets under 'obs'.")
    return EpisodeInfo.from_json(str(text), path=path, steps=steps)


def array_names(file: h5py.File) -> list[str]:
    """Paths of every array in an open episode, in alphabetical order."""
    names: list[str] = []

    def walk(group: h5py.Group, prefix: str) -> None:
        for name, child in group.items():
            if isinstance(child, h5py.Group):
                walk(child, f"{prefix}{name}/")
            else:
                names.append(prefix + name)

    walk(file, "")
    return names


def read_episode(path: Path, names: Iterable[str] | None = None) -> tuple[EpisodeInfo, Arrays]:
    """Read an episode, or only the arrays ``names`` of it.

    Raises:
        DatasetError: see :func:`open_episode` and :func:`check_arrays`; or an array of ``names`` is missing.
    """
    with open_episode(path) as file:
        info = read_info(file, path)
        wanted = list(names) if names is not None else array_names(file)
        absent = [name for name in wanted if name not in file]
        if absent:
            raise DatasetError(f"{path}: has no '{absent[0]}'; it holds {', '.join(array_names(file))}.")
        arrays = {name: file[name][()] for name in wanted}
    for name, array in arrays.items():
        if len(array) != info.steps:
            raise DatasetError(f"{path}: '{name}' has {len(array)} rows but num_samples is {info.steps}.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DatasetError(f"{path}: '{name}' holds values that are not finite; the episode cannot be used.")
    return info, arrays

"""Arrays of a zarr version 2 store, in a folder or zip file, read with every size checked before it is allocated.

The zarr library would run any registered codec that a store names, the one that unpickles included, and trust the
sizes in it. This reader knows the codecs that robot data use and nothing else, and never writes to disk.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from simtoreal.data_collection.exchange import require_size
from simtoreal.data_collection.zarr_codecs import CODECS, IMAGE_CODECS, decode_image, decompress
from simtoreal.envs.errors import DatasetError

LARGEST_CHUNK_BYTES = 2**30
LARGEST_METADATA_BYTES = 2**20
MOST_MEMBERS = 5_000_000
MOST_ROWS = 20_000_000


class Store(Protocol):
    """Bytes by key."""

    where: Path

    def get(self, key: str, limit: int) -> bytes | None:
        """Content of ``key``, None if there is none; :class:`DatasetError` if it is larger than ``limit`` or unsafe."""

    def arrays(self, group: str) -> list[str]:
        """Names of the arrays below ``group``."""

    def close(self) -> None:
        """Release the file."""


class FolderStore:
    """A store in a folder."""

    def __init__(self, root: Path) -> None:
        self.where = root

    def get(self, key: str, limit: int) -> bytes | None:
        """See :class:`Store`."""
        path = self.where
        for part in _safe_parts(key, self.where):
            path = path / part
            if path.is_symlink():
                raise DatasetError(f"{path}: is a symbolic link; links are refused. Copy the store with its files.")
        if not path.is_file():
            return None
        require_size(path.stat().st_size, str(path), limit)
        return path.read_bytes()

    def arrays(self, group: str) -> list[str]:
        """See :class:`Store`."""
        return sorted(path.parent.name for path in (self.where / group).glob("*/.zarray"))

    def close(self) -> None:
        """See :class:`Store`."""


class ZipStore:
    """A store in a zip file, possibly below one folder in it; nothing is extracted.

    Raises:
        DatasetError: damaged, encrypted, or a member's name leaves the archive.
    """

    def __init__(self, path: Path) -> None:
        self.where = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DatasetError(f"{path}: is not a readable zip file ({error}).") from error
        members = self._zip.infolist()
        if len(members) > MOST_MEMBERS:
            raise DatasetError(f"{path}: holds {len(members)} files; at most {MOST_MEMBERS} are read.")
        for member in members:
            _safe_parts(member.filename, path)
            if member.flag_bits & 1:
                raise DatasetError(f"{path}: '{member.filename}' is encrypted.")
        mark = "meta/episode_ends/.zarray"
        roots = [member.filename.removesuffix(mark) for member in members if member.filename.endswith(mark)]
        if len(roots) != 1:
            raise DatasetError(f"{path}: holds {len(roots)} stores with {mark}; expected one.")
        self._root = roots[0]

    def get(self, key: str, limit: int) -> bytes | None:
        """See :class:`Store`."""
        try:
            member = self._zip.getinfo(self._root + key)
        except KeyError:
            return None
        require_size(member.file_size, f"{self.where}: '{key}'", limit)
        try:
            with self._zip.open(member) as handle:
                content = handle.read(limit + 1)
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError) as error:
            raise DatasetError(f"{self.where}: '{key}' is damaged ({error}).") from error
        require_size(len(content), f"{self.where}: '{key}'", limit)
        return content

    def arrays(self, group: str) -> list[str]:
        """See :class:`Store`."""
        prefix = f"{self._root}{group}/"
        names = (name for name in self._zip.namelist() if name.startswith(prefix) and name.endswith("/.zarray"))
        found = [name.removeprefix(prefix).removesuffix("/.zarray") for name in names]
        return sorted(name for name in found if "/" not in name)

    def close(self) -> None:
        """See :class:`Store`."""
        self._zip.close()


def open_store(path: Path) -> Store:
    """Open a folder or a zip file.

    Raises:
        DatasetError: there is nothing, or it is of zarr version 3.
    """
    if path.is_symlink():
        raise DatasetError(f"{path}: is a symbolic link; links are refused. Give the path that it points to.")
    if not path.exists():
        raise DatasetError(f"{path} does not exist.")
    store: Store = FolderStore(path) if path.is_dir() else ZipStore(path)
    if path.is_dir() and (path / "zarr.json").exists():
        raise DatasetError(
            f"{path}: is a zarr version 3 store; diffusion_policy and UMI use version 2. Convert it with "
            "zarr.copy_store or save it with zarr_format=2."
        )
    return store


def _safe_parts(key: str, where: Path) -> tuple[str, ...]:
    pure = PurePosixPath(key)
    if pure.is_absolute() or ".." in pure.parts or "\\" in key or "\0" in key or ":" in key.split("/")[0]:
        raise DatasetError(f"{where}: path '{key}' is refused; expected a path inside the store.")
    return pure.parts


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """An array of a store.

    Attributes:
        store, name: where it is, e.g. ``data/img``.
        shape, chunks: sizes.
        dtype: type of the elements, numbers only.
        compressor: ``id`` and settings, None for raw bytes.
        order: ``C`` or ``F`` inside chunks.
        separator: between chunk indices.
    """

    store: Store
    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    compressor: dict[str, Any] | None
    order: str
    separator: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.store.where}: '{self.name}'"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` … ``stop - 1``.

        Raises:
            DatasetError: a chunk is damaged or missing, or the rows are larger than what is read.
        """
        count = stop - start
        require_size(count * math.prod(self.shape[1:]) * self.dtype.itemsize, self.where)
        result = np.empty((count, *self.shape[1:]), dtype=self.dtype)
        first = range(start // self.chunks[0], -(-stop // self.chunks[0]) if count else 0)
        grids = [range(-(-size // chunk)) for size, chunk in zip(self.shape[1:], self.chunks[1:], strict=True)]
        missing = 0
        for index in product(first, *grids):
            chunk = self._chunk(index)
            if chunk is None:
                missing += 1
                continue
            low = [i * c for i, c in zip(index, self.chunks, strict=True)]
            begin = max(low[0], start)
            end = min(low[0] + self.chunks[0], stop)
            rest = [
                slice(a, min(a + c, size)) for a, c, size in zip(low[1:], self.chunks[1:], self.shape[1:], strict=True)
            ]
            inside = (slice(begin - low[0], end - low[0]), *(slice(0, part.stop - part.start) for part in rest))
            result[(slice(begin - start, end - start), *rest)] = chunk[inside]
        if missing:
            total = math.prod(map(len, (first, *grids)))
            # Zarr reads the fill value there. It may have been meant, but a copy that was interrupted looks the same.
            raise DatasetError(
                f"{self.where} lacks {missing} of the {total} chunks of rows {start} to {stop - 1}. Copy the "
                "store again; if these chunks only held the fill value, and so were never written, write it anew under "
                "zarr.config.set({'array.write_empty_chunks': True})."
            )
        return result

    def _chunk(self, index: Sequence[int]) -> np.ndarray | None:
        key = f"{self.name}/{self.separator.join(map(str, index))}"
        expected = math.prod(self.chunks) * self.dtype.itemsize
        # Incompressible data grow by less than a percent.
        stored = self.store.get(key, expected + expected // 16 + 4096)
        if stored is None:
            return None
        where = f"{self.store.where}: '{key}'"
        name = None if self.compressor is None else self.compressor["id"]
        if name in IMAGE_CODECS:
            return decode_image(stored, str(name), self.chunks, self.dtype, where)
        content = decompress(stored, name, expected, where)
        return np.frombuffer(content, self.dtype).reshape(self.chunks, order=self.order)  # type: ignore[call-overload]


def open_array(store: Store, name: str) -> StoredArray:
    """Read the description of an array.

    Raises:
        DatasetError: missing, damaged, or of a kind that is not read.
    """
    where = f"{store.where}: '{name}/.zarray'"
    text = store.get(f"{name}/.zarray", LARGEST_METADATA_BYTES)
    if text is None:
        raise DatasetError(f"{where} is missing.")
    try:
        meta = json.loads(text)
        shape, chunks = tuple(meta["shape"]), tuple(meta["chunks"])
        dtype, compressor = np.dtype(str(meta["dtype"])), meta["compressor"]
        filters, order = meta["filters"], meta["order"]
        separator = meta.get("dimension_separator", ".")
        named = None if compressor is None else str(compressor["id"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DatasetError(f"{where} is not the description of a zarr version 2 array ({error!r}).") from error
    sizes = all(isinstance(size, int) and size >= 0 for size in shape) and all(
        isinstance(c, int) and c > 0 for c in chunks
    )
    if not sizes or not 1 <= len(shape) == len(chunks) <= 6 or shape[0] > MOST_ROWS:
        raise DatasetError(f"{where}: shape {shape} with chunks {chunks} is not read (at most {MOST_ROWS} rows).")
    if dtype.kind not in "iufb" or order not in ("C", "F") or separator not in (".", "/"):
        raise DatasetError(
            f"{where}: type {dtype}, order {order!r}, separator {separator!r} are not read; use numbers."
        )
    if filters or (named is not None and named not in CODECS):
        raise DatasetError(
            f"{where}: compressor '{named}' with filters {filters} is not read; {', '.join(CODECS)} are."
        )
    require_size(math.prod(chunks) * dtype.itemsize, where, LARGEST_CHUNK_BYTES)
    return StoredArray(
        store=store, name=name, shape=shape, chunks=chunks, dtype=dtype, compressor=compressor, order=order,
        separator=separator,
    )  # fmt: skip

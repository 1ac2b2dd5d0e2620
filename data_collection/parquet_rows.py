"""Rows of parquet files from elsewhere, with sizes checked before they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.lerobot_tables import pyarrow
from simtoreal.envs.errors import DatasetError

# A few kilobytes can declare billions of repeated values; real files stay far below these.
MOST_ROWS = 20_000_000
MOST_VALUES = 1_000_000_000
LARGEST_TABLE_BYTES = 8 * 2**30
LARGEST_IMAGE_BYTES = 64 * 2**20
_IMAGE_BATCH = 16


class ParquetRows:
    """A parquet file, opened for reading.

    Raises:
        DatasetError: missing, not parquet, or larger than what is read.
        MissingDependencyError: pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        pyarrow()
        import pyarrow.parquet as pq

        self.path = path
        if not path.is_file():
            raise DatasetError(f"{path}: does not exist; the dataset is incomplete.")
        with self._explained():
            self._file = pq.ParquetFile(path)
        self.rows = int(self._file.metadata.num_rows)
        if self.rows > MOST_ROWS:
            raise DatasetError(f"{path}: declares {self.rows} rows; at most {MOST_ROWS} are read.")
        self.names = list(self._file.schema_arrow.names)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, OverflowError, ValueError) as error:  # ValueError: names in no UTF-8
            raise DatasetError(f"{self.path}: cannot be read as parquet, it is damaged ({error}).") from error

    def columns(self, names: Collection[str]) -> dict[str, Any]:
        """Name -> whole column, a pyarrow array.

        Raises:
            DatasetError: a column is missing, damaged or too large.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            raise DatasetError(f"{self.path}: has no column '{missing[0]}'; it holds {', '.join(self.names[:20])}.")
        if not names:
            return {}
        values = size = 0
        # pyarrow 26 ends the process for some damaged column descriptions (its C++ exception stays one). Without
        # them a small file could ask for any amount of memory, which is worse; imports store whole episodes only.
        with self._explained():
            metadata = self._file.metadata
            for group in range(metadata.num_row_groups):
                for index in range(metadata.num_columns):
                    chunk = metadata.row_group(group).column(index)
                    if chunk.path_in_schema.split(".list.")[0] in names or chunk.path_in_schema in names:
                        values, size = values + chunk.num_values, size + chunk.total_uncompressed_size
        if values > MOST_VALUES or size > LARGEST_TABLE_BYTES:
            raise DatasetError(
                f"{self.path}: declares {values} values, {size / 1e9:.1f} GB; that is more than is read."
            )
        with self._explained():
            table = self._file.read(columns=list(names), use_threads=False)
            return {name: table.column(name).combine_chunks() for name in names}

    def images(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Encoded images of the rows ``start`` … ``stop - 1``, read a few at a time.

        Raises:
            DatasetError: the column is missing, or a row holds no image.
        """
        if name not in self.names:
            raise DatasetError(f"{self.path}: has no column '{name}'.")
        metadata = self._file.metadata
        groups: list[int] = []
        first = offset = 0
        for group in range(metadata.num_row_groups):
            end = offset + metadata.row_group(group).num_rows
            if offset < stop and end > start:
                first = offset if not groups else first
                groups.append(group)
            offset = end
        row = first
        with self._explained():
            for batch in self._file.iter_batches(_IMAGE_BATCH, row_groups=groups, columns=[name], use_threads=False):
                for value in batch.column(0):
                    if start <= row < stop:
                        content = value.as_py()
                        encoded = content.get("bytes") if isinstance(content, dict) else content
                        if not isinstance(encoded, bytes) or len(encoded) > LARGEST_IMAGE_BYTES:
                            raise DatasetError(f"{self.path}: row {row} of '{name}' holds no image.")
                        yield encoded
                    row += 1


def to_numpy(column: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Return a column of numbers or (nested) lists as an array ``(rows, *shape)``; ``(1,)`` gives ``(rows,)``.

    Raises:
        DatasetError: nulls, texts, or lists of another length.
    """
    import pyarrow as pa

    rows = len(column)
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    lists = (pa.types.is_list, pa.types.is_fixed_size_list, pa.types.is_large_list)
    while any(is_kind(values.type) for is_kind in lists):
        if values.null_count:
            raise DatasetError(f"{where} holds empty rows.")
        values = values.flatten()
    if values.null_count or not (
        pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type)
    ):
        raise DatasetError(f"{where} has type {column.type} (or empty rows); expected numbers.")
    expected = rows * int(np.prod(shape, dtype=np.int64))
    if len(values) != expected:
        raise DatasetError(f"{where} holds {len(values)} values in {rows} rows; info.json says {shape} per row.")
    array = values.to_numpy(zero_copy_only=False)
    return array.reshape(rows, *shape) if shape != (1,) else array.reshape(rows)

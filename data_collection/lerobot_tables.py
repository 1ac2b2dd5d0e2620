"""The parquet files of LeRobotDataset v3.0, written as lerobot reads them, without pandas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.lerobot_statistics import KEYS, Summary
from simtoreal.envs.errors import require
from simtoreal.envs.files import atomic_path


def pyarrow() -> Any:
    """Return the module ``pyarrow``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    return require("pyarrow", "lerobot")


def frame_column(values: np.ndarray) -> Any:
    """Return numeric rows ``(T, ...)`` as a column: a number, a list of fixed size, or nested lists per frame."""
    pa = pyarrow()
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    shape = values.shape[1:]
    if int(np.prod(shape, dtype=np.int64)) == 1 and len(shape) <= 1:
        return flat
    if len(shape) == 1:
        return pa.FixedSizeListArray.from_arrays(flat, shape[0])
    for size in reversed(shape):
        flat = pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, size, dtype=np.int32), flat)
    return flat


def png_column(frames: np.ndarray) -> Any:
    """Return frames ``(T, H, W, 3)`` uint8 RGB as PNG files, as the ``Image`` of Hugging Face datasets holds them."""
    import cv2

    pa = pyarrow()
    encoded = [cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))[1].tobytes() for frame in frames]
    return pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.array([None] * len(encoded), pa.string())], names=["bytes", "path"]
    )


def write_table(path: Path, columns: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write one row group, atomically.

    Raises:
        OSError: the disk is full.
    """
    pa = pyarrow()
    import pyarrow.parquet as pq

    table = pa.table(dict(columns))
    if metadata:
        table = table.replace_schema_metadata(dict(metadata))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="snappy", row_group_size=max(1, table.num_rows))


def write_tasks(path: Path, tasks: Sequence[str]) -> None:
    """Write ``meta/tasks.parquet``: to pandas, a frame with the index ``task`` and the column ``task_index``."""
    pa = pyarrow()

    def column(name: str | None, kind: str, numpy_type: str) -> dict[str, Any]:
        return {
            "name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None,
        }  # fmt: skip

    description = {
        "index_columns": ["task"],
        "column_indexes": [
            {**column("", "unicode", "object"), "name": None, "field_name": None, "metadata": {"encoding": "UTF-8"}}
        ],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    columns = {"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(list(tasks), pa.string())}
    write_table(path, columns, {"pandas": json.dumps(description)})


def episode_columns(row: Mapping[str, Any], statistics: Mapping[str, Summary]) -> dict[str, Any]:
    """Columns of a ``meta/episodes`` file of one episode.

    Args:
        row: the plain columns: numbers, and ``tasks`` as a list of texts.
        statistics: feature -> summary. All files of a dataset need the same columns, or lerobot's append
            succeeds and the dataset does not open any more.
    """
    pa = pyarrow()
    columns: dict[str, Any] = {}
    for name, value in row.items():
        columns[name] = pa.array([value], pa.list_(pa.string())) if isinstance(value, list) else pa.array([value])
    for feature, summary in statistics.items():
        for key in KEYS:
            columns[f"stats/{feature}/{key}"] = pa.array([summary[key].tolist()])
    return columns

"""What a LeRobotDataset (v3.0 or v2.1) holds and where, read from its ``meta`` folder without trusting it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simtoreal.data_collection import lerobot_layout as layout
from simtoreal.data_collection.exchange import LARGEST_JSON_BYTES, MOST_EPISODES, parse_object, require_size
from simtoreal.data_collection.parquet_rows import ParquetRows, to_numpy
from simtoreal.envs.errors import DatasetError

_LARGEST_FPS = 10_000
IMAGE_TYPES = ("video", "image")
# Without these it is unknown which rows are an episode, and what was to be done.
_NEEDED = ("episode_index", "frame_index", "task_index")


@dataclass(frozen=True, kw_only=True)
class EpisodeEntry:
    """Where an episode is.

    Attributes:
        index: of the episode.
        steps: its length.
        data: parquet file.
        videos: feature -> (file, time of the first frame in seconds).
    """

    index: int
    steps: int
    data: Path
    videos: dict[str, tuple[Path, float]]


@dataclass(frozen=True, kw_only=True)
class Index:
    """Content of ``meta``.

    Attributes:
        root: folder of the dataset.
        fps: frames per second.
        robot: type of the robot.
        features: feature -> ``dtype``, ``shape`` (tuple; images height, width, channels), ``names``.
        tasks: task index -> text.
        entries: episodes, by their index.
    """

    root: Path
    fps: float
    robot: str
    features: dict[str, dict[str, Any]]
    tasks: dict[int, str]
    entries: tuple[EpisodeEntry, ...]


def read_index(root: Path) -> Index:
    """Read ``meta`` of a dataset.

    Raises:
        DatasetError: something is missing, damaged, unsafe or of an unknown version.
    """
    path = layout.inside(root, layout.INFO, {}, str(root))
    info = read_json(path)
    version = str(info.get("codebase_version"))
    if not version.startswith(("v3.", "v2.")):
        raise DatasetError(f"{path}: codebase_version is '{version}'; v3.0, v2.1 and v2.0 are read.")
    fps = info.get("fps")
    if not isinstance(fps, int | float) or not 0 < fps <= _LARGEST_FPS:
        raise DatasetError(f"{path}: fps is {fps!r}; expected a positive number.")
    features = _features(info, path)
    total = info.get("total_episodes")
    if not isinstance(total, int) or not 0 <= total <= MOST_EPISODES:
        raise DatasetError(f"{path}: total_episodes is {total!r}; expected a number up to {MOST_EPISODES}.")
    read = _read_v3 if version.startswith("v3.") else _read_v2
    try:
        tasks, entries = read(root, info, path, features, total)
    except (ValueError, TypeError, OverflowError) as error:  # nulls, texts, nan or infinity as numbers
        raise DatasetError(f"{root / 'meta'}: the tables of tasks and episodes are damaged ({error}).") from error
    if [entry.index for entry in entries] != list(range(total)):
        raise DatasetError(
            f"{root}: meta lists episodes {[entry.index for entry in entries][:5]}..., info.json says 0 to {total - 1}."
        )
    return Index(
        root=root, fps=float(fps), robot=str(info.get("robot_type") or "unknown"),
        features=features, tasks=tasks, entries=tuple(entries),
    )  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of bounded size.

    Raises:
        DatasetError: missing, too large or not a JSON object.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: does not exist; not a LeRobot dataset.")
    require_size(path.stat().st_size, str(path), LARGEST_JSON_BYTES)
    return parse_object(path.read_bytes(), str(path))


def _features(info: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    features = info.get("features")
    if not isinstance(features, dict):
        raise DatasetError(f"{path}: key 'features' is missing.")
    found: dict[str, dict[str, Any]] = {}
    for name, feature in features.items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        valid = isinstance(shape, list) and all(isinstance(size, int) and 0 < size < 2**24 for size in shape)
        if not valid or not isinstance(feature.get("dtype"), str) or "/" in name or name in ("", ".", ".."):
            raise DatasetError(f"{path}: feature '{name}' is malformed; expected a dtype and a shape.")
        if feature["dtype"] in IMAGE_TYPES and len(shape) == 3 and shape[0] == 3 != shape[2]:
            shape = [*shape[1:], 3]  # some datasets declare (channels, height, width)
        found[name] = {
            "dtype": feature["dtype"],
            "shape": tuple(shape),
            "names": _flat_names(feature.get("names")),
        }
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise DatasetError(f"{path}: feature '{missing[0]}' is missing, which every LeRobot dataset has. Restore it.")
    return found


def _flat_names(names: Any) -> tuple[str, ...]:
    """Names of dimensions, which are a list, or lists in a mapping (``{"motors": [...]}``)."""
    if isinstance(names, dict):
        return tuple(name for value in names.values() for name in _flat_names(value))
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _videos(features: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, feature in features.items() if feature["dtype"] == "video"]


def _template(info: dict[str, Any], key: str, path: Path) -> str:
    if not isinstance(info.get(key), str):
        raise DatasetError(f"{path}: key '{key}' is missing.")
    return str(info[key])


def _read_v3(
    root: Path, info: dict[str, Any], path: Path, features: dict[str, dict[str, Any]], total: int
) -> tuple[dict[int, str], list[EpisodeEntry]]:
    tasks_file = ParquetRows(layout.inside(root, layout.TASKS, {}, str(path)))
    # pandas calls an index without a name by its level.
    text_name = next((name for name in ("task", "__index_level_0__") if name in tasks_file.names), "task")
    columns = tasks_file.columns(["task_index", text_name])
    texts = zip(columns["task_index"].to_pylist(), columns[text_name].to_pylist(), strict=True)
    tasks = {int(number): str(text) for number, text in texts}
    data_path = _template(info, "data_path", path)
    videos = _videos(features)
    video_path = _template(info, "video_path", path) if videos else ""
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    video_columns = ("chunk_index", "file_index", "from_timestamp")
    names += [f"videos/{key}/{column}" for key in videos for column in video_columns]
    folder = layout.inside(root, "meta/episodes", {}, str(path))
    entries: dict[int, EpisodeEntry] = {}
    for file in sorted(folder.glob("*/*.parquet")):
        rows = ParquetRows(layout.inside(root, str(file.relative_to(root)), {}, str(path)))
        read = {name: to_numpy(column, (1,), f"{file}: '{name}'") for name, column in rows.columns(names).items()}
        for row in range(rows.rows):
            value = {name: column[row].item() for name, column in read.items()}
            index = int(value["episode_index"])
            if index >= total:
                continue  # written by a writer that was killed before it updated info.json
            place = {"chunk_index": int(value["data/chunk_index"]), "file_index": int(value["data/file_index"])}
            where: dict[str, tuple[Path, float]] = {}
            for key in videos:
                at = {name: int(value[f"videos/{key}/{name}"]) for name in video_columns[:2]}
                file_path = layout.inside(root, video_path, {"video_key": key, **at}, str(path))
                begin_s = float(value[f"videos/{key}/from_timestamp"])
                if not 0 <= begin_s < math.inf:
                    raise DatasetError(f"{file}: 'videos/{key}/from_timestamp' is {begin_s}; expected seconds.")
                where[key] = (file_path, begin_s)
            data = layout.inside(root, data_path, place, str(path))
            entries[index] = EpisodeEntry(index=index, steps=int(value["length"]), data=data, videos=where)
    return tasks, [entries[index] for index in sorted(entries)]


def _read_v2(
    root: Path, info: dict[str, Any], path: Path, features: dict[str, dict[str, Any]], total: int
) -> tuple[dict[int, str], list[EpisodeEntry]]:
    texts = _json_lines(root, "meta/tasks.jsonl", ("task_index", "task"))
    tasks = {int(row["task_index"]): str(row["task"]) for row in texts}
    chunk = info.get("chunks_size", layout.CHUNK)
    if not isinstance(chunk, int) or chunk < 1:
        raise DatasetError(f"{path}: chunks_size is {chunk!r}; expected a positive number.")
    data_path = _template(info, "data_path", path)
    videos = _videos(features)
    video_path = _template(info, "video_path", path) if videos else ""
    entries = []
    for row in _json_lines(root, "meta/episodes.jsonl", ("episode_index", "length")):
        index = int(row["episode_index"])
        place = {"episode_chunk": index // chunk, "episode_index": index}
        where = {key: (layout.inside(root, video_path, {"video_key": key, **place}, str(path)), 0.0) for key in videos}
        data = layout.inside(root, data_path, place, str(path))
        entries.append(EpisodeEntry(index=index, steps=int(row["length"]), data=data, videos=where))
    return tasks, sorted((entry for entry in entries if entry.index < total), key=lambda entry: entry.index)


def _json_lines(root: Path, name: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    path = layout.inside(root, name, {}, str(root))
    if not path.is_file():
        raise DatasetError(f"{path}: does not exist; not a LeRobot v2 dataset.")
    require_size(path.stat().st_size, str(path), LARGEST_JSON_BYTES)
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None:
                rows.append({**row, **{key: row[key] for key in keys}})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DatasetError(f"{path}: line {number} is not an object with {', '.join(keys)} ({error}).") from error
    return rows

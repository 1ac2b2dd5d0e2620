"""Names, paths and columns of LeRobotDataset v3.0, and how our arrays map to its features.

========================  ==========================================================================
ours                      LeRobot
========================  ==========================================================================
``obs/<camera>_image``    ``observation.images.<camera>``, a video (or PNG in the parquet file)
``obs/proprio``           ``observation.state``; without it, all vector observations joined
``actions``               ``action``
``rewards``               ``next.reward``; ``next.done`` is the last step, ``next.success`` a success
instruction of the step   ``task_index`` into ``meta/tasks.parquet``
everything else           ``simtoreal.<name>``, e.g. ``simtoreal.step.target``, ``simtoreal.obs.object_state``
========================  ==========================================================================

LeRobot's policies take every feature that begins with ``observation`` as an input, so what a policy must not see by
accident (the truth about the scene) is kept below ``simtoreal``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo, array_names, open_episode
from simtoreal.data_collection.exchange import is_image_shape
from simtoreal.data_collection.foreign_embodiment import IMAGE_SUFFIX, PROPRIO
from simtoreal.envs.errors import DatasetError

VERSION = "v3.0"
CHUNK = 1000
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
# What LeRobot cannot express; it ignores files that it does not know.
SIDECAR = "meta/simtoreal.json"
EPISODE_SIDECAR = "meta/simtoreal/episode-{episode_index:06d}.json"
EPISODE_ARRAYS = "meta/simtoreal/episode-{episode_index:06d}.npz"

STATE, ACTION, CAMERAS, OWN = "observation.state", "action", "observation.images.", "simtoreal."
REWARD, DONE, SUCCESS = "next.reward", "next.done", "next.success"
DEFAULTS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Columns that every dataset has, and their types; one number per frame."""

_PLACEHOLDER = re.compile(r"\{(\w+)(?::0(\d)d)?\}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which array of an episode goes where.

    Attributes:
        features: as in ``info.json``, in its order, without the five defaults.
        arrays: our array -> feature that holds it exactly (images: as far as the codec is exact).
        shapes: array -> (shape of one step, dtype) of everything that every episode has.
        state_parts: arrays that ``observation.state`` joins when there is no ``proprio``.
    """

    features: dict[str, dict[str, Any]]
    arrays: dict[str, str]
    shapes: dict[str, tuple[tuple[int, ...], str]]
    state_parts: tuple[str, ...]

    @property
    def cameras(self) -> dict[str, str]:
        """Image array -> its feature."""
        return {name: feature for name, feature in self.arrays.items() if feature.startswith(CAMERAS)}


def plan_features(dataset: Dataset, episodes: Sequence[EpisodeInfo], *, codec: str | None) -> Plan:
    """Decide the features of an export. Arrays that not every episode has alike are left to the sidecar.

    Args:
        dataset: to export.
        episodes: of it, at least one.
        codec: of the videos; None stores images in the parquet files.

    Raises:
        DatasetError: there is no episode, or one is damaged.
    """
    shapes = _common_shapes(episodes)
    features: dict[str, dict[str, Any]] = {}
    arrays: dict[str, str] = {}
    embodiment, fps = dataset.embodiment, dataset.embodiment.control_hz
    for name, (shape, dtype) in shapes.items():
        if name.startswith("obs/") and name.endswith(IMAGE_SUFFIX) and is_image_shape(shape) and dtype == "uint8":
            feature = CAMERAS + name.removeprefix("obs/").removesuffix(IMAGE_SUFFIX)
            features[feature] = _image_feature(shape, fps, codec)
            arrays[name] = feature
    state_parts: tuple[str, ...] = ()
    if f"obs/{PROPRIO}" in shapes:
        arrays[f"obs/{PROPRIO}"] = STATE
        width = shapes[f"obs/{PROPRIO}"][0][0]
        names: Sequence[str] = embodiment.proprio.names if embodiment.proprio.dim == width else ()
        features[STATE] = _feature("float32", (width,), names)
    else:
        state_parts = tuple(
            name for name, (shape, dtype) in shapes.items()
            if name.startswith("obs/") and len(shape) == 1 and dtype[0] == "f" and name != "obs/object_state"
        )  # fmt: skip
        names = [f"{name[4:]}_{i}" for name in state_parts for i in range(shapes[name][0][0])]
        if names:
            features[STATE] = _feature("float32", (len(names),), names)
    arrays["actions"], arrays["rewards"] = ACTION, REWARD
    features[ACTION] = _feature("float32", shapes["actions"][0], embodiment.action.names)
    features[REWARD] = _feature("float32", (1,))
    features[DONE] = features[SUCCESS] = _feature("bool", (1,))
    for name, (shape, dtype) in shapes.items():
        if name not in arrays and 0 not in shape:
            arrays[name] = OWN + name.replace("/", ".")
            features[arrays[name]] = _feature(dtype, shape or (1,))
    return Plan(features=features, arrays=arrays, shapes=shapes, state_parts=state_parts)


def _common_shapes(episodes: Sequence[EpisodeInfo]) -> dict[str, tuple[tuple[int, ...], str]]:
    common: dict[str, tuple[tuple[int, ...], str]] | None = None
    for episode in episodes:
        with open_episode(Path(str(episode.path))) as file:
            own = {name: (tuple(file[name].shape[1:]), str(file[name].dtype)) for name in array_names(file)}
        common = own if common is None else {name: kind for name, kind in common.items() if own.get(name) == kind}
    if not common:
        raise DatasetError("there is no episode to export.")
    return common


def _feature(dtype: str, shape: Sequence[int], names: Sequence[str] = ()) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "names": list(names) or None}


def _image_feature(shape: tuple[int, ...], fps: float, codec: str | None) -> dict[str, Any]:
    from simtoreal.data_collection.lerobot_video import pixel_format

    feature = _feature("image" if codec is None else "video", shape, ("height", "width", "channels"))
    if codec is not None:
        feature["info"] = {
            "video.height": shape[0], "video.width": shape[1], "video.codec": codec,
            "video.pix_fmt": pixel_format(shape[0], shape[1]), "video.is_depth_map": False,
            "video.fps": whole(fps), "video.channels": 3, "has_audio": False,
        }  # fmt: skip
    return feature


def whole(number: float) -> float:
    """Return an integer where the number is one: lerobot computes with integer rates."""
    return int(number) if float(number).is_integer() else number


def info_json(plan: Plan, robot: str, fps: float, episodes: int, frames: int, tasks: int) -> dict[str, Any]:
    """Content of ``meta/info.json``."""
    video = any(feature["dtype"] == "video" for feature in plan.features.values())
    defaults = {name: _feature(dtype, (1,)) for name, dtype in DEFAULTS.items()}
    return {
        "codebase_version": VERSION, "robot_type": robot, "total_episodes": episodes, "total_frames": frames,
        "total_tasks": tasks, "chunks_size": CHUNK, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
        "fps": whole(fps), "splits": {"train": f"0:{episodes}"}, "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if video else None, "features": {**plan.features, **defaults},
    }  # fmt: skip


def file_indices(episode: int) -> dict[str, int]:
    """Chunk and file of an episode in the layout of one file per episode."""
    return {"chunk_index": episode // CHUNK, "file_index": episode % CHUNK}


def inside(root: Path, template: str, values: Mapping[str, int | str], where: str) -> Path:
    """Fill a path template of ``info.json`` and return the file below ``root``.

    Only plain ``{name}`` and ``{name:03d}`` are understood, so that a hostile template reaches neither attributes of
    Python objects nor files elsewhere.

    Raises:
        DatasetError: unknown placeholder, a path that leaves ``root``, or a symbolic link on the way.
    """

    def fill(match: re.Match[str]) -> str:
        name, digits = match[1], match[2]
        if name not in values:
            raise DatasetError(f"{where}: template '{template}' has an unknown placeholder '{{{name}}}'.")
        return f"{values[name]:0{digits}d}" if digits and isinstance(values[name], int) else str(values[name])

    relative = PurePosixPath(_PLACEHOLDER.sub(fill, template))
    text = str(relative)
    if relative.is_absolute() or ".." in relative.parts or "{" in text or "\\" in text or "\0" in text:
        raise DatasetError(f"{where}: path '{text}' is refused; expected a path below the dataset.")
    path = root
    for part in relative.parts:
        path = path / part
        if path.is_symlink():
            raise DatasetError(
                f"{path}: is a symbolic link; links are refused. Copy the dataset with its files ('cp -rL')."
            )
    return path

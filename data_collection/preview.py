"""Shows a dataset: a video that plays many episodes side by side, or one episode in rerun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo
from simtoreal.envs.errors import DatasetError, closest, require

_WIDTH_PX = 160


def contact_sheet(dataset: Dataset, episodes: Sequence[EpisodeInfo], camera: str, path: Path) -> Path:
    """Write an MP4 in which the episodes play side by side at the control rate; ended ones hold their last frame.

    Args:
        dataset: the dataset.
        episodes: what to show, at least one.
        camera: name of a camera of the embodiment, e.g. ``"front"``.
        path: file to write.

    Raises:
        DatasetError: no such camera, or an episode has no images of it.
    """
    from simtoreal.envs.video import tile, write_video

    cameras = [spec.name for spec in dataset.embodiment.cameras]
    if camera not in cameras:
        raise DatasetError(f"{dataset.path}: has no camera '{camera}'. {closest(camera, cameras)}")
    if not episodes:
        raise DatasetError(f"{dataset.path}: holds no episodes to show.")
    clips = [dataset.read(episode, [f"obs/{camera}_image"])[f"obs/{camera}_image"] for episode in episodes]
    labels = [f"{episode.name} {'ok' if episode.success else episode.failure}" for episode in episodes]
    scale = max(1, round(_WIDTH_PX / clips[0].shape[2]))

    def frames() -> Iterator[np.ndarray]:
        for step in range(max(len(clip) for clip in clips)):
            yield tile([clip[min(step, len(clip) - 1)] for clip in clips], labels=labels, scale=scale)

    return write_video(path, frames(), dataset.embodiment.control_hz)


def show_in_rerun(dataset: Dataset, episode: EpisodeInfo, path: Path) -> Path:
    """Write images, proprio, actions and rewards of an episode as a rerun recording (``.rrd``).

    Raises:
        MissingDependencyError: rerun is not installed.
        DatasetError: the episode is damaged.
    """
    rerun: Any = require("rerun", "rerun", package="rerun-sdk")
    arrays = dataset.read(episode)
    recording = rerun.RecordingStream(f"simtoreal {dataset.path.name} {episode.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    recording.save(str(path))
    times = arrays.get("step/timestamp_ns", np.arange(episode.steps) * dataset.embodiment.control_period_s * 1e9)
    for step in range(episode.steps):
        recording.set_time("time", duration=float(times[step] - times[0]) * 1e-9)
        for name, array in arrays.items():
            value = array[step]
            if value.ndim == 3 and value.dtype == np.uint8:
                recording.log(name, rerun.Image(value))
            elif value.ndim < 2 and value.size and name != "states":
                recording.log(name, rerun.Scalars(np.atleast_1d(value).astype(np.float64)))
    recording.flush()
    return path

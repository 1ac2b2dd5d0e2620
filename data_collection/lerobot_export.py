"""Writes a dataset as LeRobotDataset v3.0, so that it is complete and readable after every episode.

Each episode has files of its own: one parquet file, one video per camera, one file of ``meta/episodes``. They are
written under other names, flushed and renamed; ``info.json``, which says how many episodes there are, is replaced
last. A killed export therefore leaves what it had finished, and the next call continues after it.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection import lerobot_layout as layout
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, disk_errors
from simtoreal.data_collection.exchange import Progress
from simtoreal.data_collection.filters import action_digest
from simtoreal.data_collection.lerobot_index import read_json
from simtoreal.data_collection.lerobot_statistics import FeatureStatistics, Summary, to_json
from simtoreal.data_collection.lerobot_tables import (
    episode_columns,
    frame_column,
    png_column,
    pyarrow,
    write_table,
    write_tasks,
)
from simtoreal.data_collection.lerobot_video import Codec, encode, require_encodable
from simtoreal.data_collection.writer import lock_folder
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.files import atomic_path, write_json

SIDECAR_VERSION = 1
# Statistics of the whole dataset are computed anew at most in this share of the time; at the end in any case.
_STATISTICS_SHARE = 0.1


def export_lerobot(
    dataset: Dataset,
    output: Path,
    *,
    episodes: Sequence[EpisodeInfo] | None = None,
    codec: Codec | None = "h264",
    progress: Progress | None = None,
) -> int:
    """Write the episodes as LeRobotDataset v3.0 and return their number of steps.

    An export that was interrupted, or whose source has grown since, continues after the episodes that are there.

    Args:
        dataset: to export.
        output: folder, new or of an earlier export of the same episodes.
        episodes: by default all.
        codec: of the videos; None stores PNG images in the parquet files, which is exact.
        progress: see :data:`~simtoreal.data_collection.exchange.Progress`.

    Raises:
        ConfigError: the codec cannot hold images of this size.
        DatasetError: the folder holds something else, an episode is damaged, or the disk is full.
        MissingDependencyError: pyarrow is not installed.
    """
    pyarrow()
    chosen = list(dataset.episodes if episodes is None else episodes)
    plan = layout.plan_features(dataset, chosen, codec=codec)
    if codec is not None:
        for name, feature in plan.cameras.items():
            height, width = plan.shapes[name][0][:2]
            require_encodable(codec, height, width, camera=feature.removeprefix(layout.CAMERAS))
    lock = lock_folder(output)
    try:
        return _Export(dataset, plan, output, codec).run(chosen, progress)
    finally:
        lock.close()


class _Export:
    def __init__(self, dataset: Dataset, plan: layout.Plan, output: Path, codec: Codec | None) -> None:
        self.dataset, self.plan, self.output, self.codec = dataset, plan, output, codec
        self.fps = dataset.embodiment.control_hz
        self.tasks: dict[str, int] = {}
        self.steps = 0
        self.statistics: dict[str, FeatureStatistics] = {}

    def run(self, chosen: Sequence[EpisodeInfo], progress: Progress | None) -> int:
        done = self._resume(chosen)
        statistics_s, began = 0.0, time.monotonic()
        for index, episode in enumerate(chosen):
            arrays = self.dataset.read(episode)
            texts = _instructions(episode, arrays)
            first_task = len(self.tasks)
            for text in texts:
                self.tasks.setdefault(text, len(self.tasks))
            frames = self._frames(arrays, texts, index, success=episode.success)
            statistics = self._count(frames)
            if index >= done:
                with disk_errors(self.output):
                    self._write_episode(index, episode, arrays, frames, statistics, texts)
                    if len(self.tasks) > first_task or index == done:
                        write_tasks(self.output / layout.TASKS, list(self.tasks))
            self.steps += episode.steps
            if index >= done:
                with disk_errors(self.output):
                    began_statistics = time.monotonic()
                    last = index + 1 == len(chosen)
                    if last or statistics_s <= _STATISTICS_SHARE * (began_statistics - began):
                        self._write_statistics()
                        statistics_s += time.monotonic() - began_statistics
                    self._write_info(index + 1)
            if progress is not None:
                progress(index + 1, len(chosen))
        return self.steps

    def _resume(self, chosen: Sequence[EpisodeInfo]) -> int:
        """Return how many episodes are there already, after checking that they are the first of ``chosen``."""
        description = {
            "version": SIDECAR_VERSION,
            "embodiment": self.dataset.embodiment.to_dict(),
            "tasks": self.dataset.tasks,
            "masks": {},
            "codec": self.codec or "png",
            "arrays": self.plan.arrays,
            "shapes": {name: [list(shape), dtype] for name, (shape, dtype) in self.plan.shapes.items()},
        }
        description = json.loads(json.dumps(description))
        sidecar, info = self.output / layout.SIDECAR, self.output / layout.INFO
        done = 0
        if sidecar.exists():
            for left in self.output.rglob(".*.tmp"):  # of an export that was killed; nobody else holds the lock
                left.unlink()
            stored = read_json(sidecar)
            differing = [key for key, value in description.items() if key != "masks" and stored.get(key) != value]
            if differing:
                raise DatasetError(
                    f"{self.output}: holds an export with other {', '.join(differing)}. Choose a new folder."
                )
            done = read_json(info).get("total_episodes") if info.exists() else 0
            if not isinstance(done, int) or done < 0:
                raise DatasetError(f"{info}: total_episodes is {done!r}; expected a number. Export to a new folder.")
        elif any(path.is_file() and path.name[0] != "." for path in self.output.rglob("*")):
            raise DatasetError(f"{self.output}: is not empty and no export of ours. Choose a new folder.")
        for index, episode in enumerate(chosen[:done]):
            path = layout.inside(self.output, layout.EPISODE_SIDECAR, {"episode_index": index}, str(sidecar))
            stored = read_json(path) if path.exists() else {}
            if any(stored.get(key) != value for key, value in self._episode_sidecar(episode).items()):
                raise DatasetError(
                    f"{self.output}: episode {index} is not '{episode.name}' of {self.dataset.path} any more. "
                    "Only the same episodes in the same order can be continued; choose a new folder."
                )
        if done > len(chosen):
            raise DatasetError(f"{self.output}: holds {done} episodes, more than the {len(chosen)} to export.")
        number = {episode.name: index for index, episode in enumerate(chosen)}
        masks = {name: [number[m] for m in members if m in number] for name, members in self.dataset.masks.items()}
        description["masks"] = {name: members for name, members in masks.items() if members}
        with disk_errors(sidecar):
            write_json(sidecar, description)
        return done

    @staticmethod
    def _episode_sidecar(episode: EpisodeInfo) -> dict[str, Any]:
        return {"name": episode.name, "steps": episode.steps, "episode": json.loads(episode.to_json())}

    def _frames(self, arrays: Arrays, texts: Sequence[str], index: int, *, success: bool) -> dict[str, np.ndarray]:
        """Feature -> rows of one episode, in the order of ``info.json``, images included."""
        steps = len(texts)
        by_feature = {feature: arrays[name] for name, feature in self.plan.arrays.items()}
        if self.plan.state_parts:
            joined = np.concatenate([arrays[name] for name in self.plan.state_parts], axis=1)
            by_feature[layout.STATE] = joined.astype(np.float32)
        by_feature[layout.DONE] = np.arange(steps) == steps - 1
        # Not 'dones', which also end a task by its failure, and which an operator's verdict need not set.
        by_feature[layout.SUCCESS] = by_feature[layout.DONE] & success
        for feature in (layout.ACTION, layout.REWARD, layout.STATE):
            if feature in by_feature:
                by_feature[feature] = by_feature[feature].astype(np.float32)
        rows = {feature: by_feature[feature] for feature in self.plan.features}
        count = np.arange(steps, dtype=np.int64)
        return rows | {
            "timestamp": (count / self.fps).astype(np.float32),
            "frame_index": count,
            "episode_index": np.full(steps, index, dtype=np.int64),
            "index": self.steps + count,
            "task_index": np.array([self.tasks[text] for text in texts], dtype=np.int64),
        }

    def _count(self, frames: dict[str, np.ndarray]) -> dict[str, Summary]:
        """Statistics of one episode, which are added to those of the dataset."""
        summaries: dict[str, Summary] = {}
        for feature, rows in frames.items():
            image = feature.startswith(layout.CAMERAS)
            own = FeatureStatistics(image)
            own.update(rows)
            summaries[feature] = own.summary()
            self.statistics.setdefault(feature, FeatureStatistics(image)).merge(own)
        return summaries

    def _write_episode(
        self,
        index: int,
        episode: EpisodeInfo,
        arrays: Arrays,
        frames: dict[str, np.ndarray],
        statistics: dict[str, Summary],
        texts: Sequence[str],
    ) -> None:
        place = layout.file_indices(index)
        row: dict[str, Any] = {
            "episode_index": index, "tasks": list(dict.fromkeys(texts)), "length": episode.steps,
            "data/chunk_index": place["chunk_index"], "data/file_index": place["file_index"],
            "dataset_from_index": self.steps, "dataset_to_index": self.steps + episode.steps,
        }  # fmt: skip
        columns: dict[str, Any] = {}
        for feature, rows in frames.items():
            if not feature.startswith(layout.CAMERAS):
                columns[feature] = frame_column(rows)
            elif self.codec is None:
                columns[feature] = png_column(rows)
            else:
                path = self.output / layout.VIDEO_PATH.format(video_key=feature, **place)
                with atomic_path(path) as temporary:
                    encode(temporary, rows, self.fps, self.codec)
                row |= {f"videos/{feature}/{key}": value for key, value in place.items()}
                row |= {
                    f"videos/{feature}/from_timestamp": 0.0,
                    f"videos/{feature}/to_timestamp": episode.steps / self.fps,
                }
        write_table(self.output / layout.DATA_PATH.format(**place), columns)
        self._write_sidecar(index, episode, arrays)
        row |= {"meta/episodes/chunk_index": place["chunk_index"], "meta/episodes/file_index": place["file_index"]}
        write_table(self.output / layout.EPISODES_PATH.format(**place), episode_columns(row, statistics))

    def _write_sidecar(self, index: int, episode: EpisodeInfo, arrays: Arrays) -> None:
        rest = {name: array for name, array in arrays.items() if name not in self.plan.shapes}
        if rest:
            buffer = io.BytesIO()
            np.savez(buffer, **rest)
            with atomic_path(self.output / layout.EPISODE_ARRAYS.format(episode_index=index)) as temporary:
                temporary.write_bytes(buffer.getvalue())
        path = self.output / layout.EPISODE_SIDECAR.format(episode_index=index)
        # By its actions an import notices that lerobot's tools have given the number to another episode.
        write_json(path, {**self._episode_sidecar(episode), "actions": action_digest(arrays["actions"])})

    def _write_statistics(self) -> None:
        summaries = {feature: statistics.summary() for feature, statistics in self.statistics.items()}
        write_json(self.output / layout.STATS, to_json(summaries))

    def _write_info(self, episodes: int) -> None:
        robot = self.dataset.embodiment.name
        info = layout.info_json(self.plan, robot, self.fps, episodes, self.steps, len(self.tasks))
        write_json(self.output / layout.INFO, info)


def _instructions(episode: EpisodeInfo, arrays: Arrays) -> list[str]:
    """The instruction in force at every step; the task's name where there is none, as lerobot needs a text."""
    texts = [text or episode.task for text in episode.instructions or (episode.instruction,)]
    if len(texts) == 1:
        return texts * episode.steps
    return [texts[index] for index in arrays["step/instruction"]]

"""Counts what a dataset holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import EPISODES, Dataset, episode_files
from simtoreal.data_collection.episode import array_names, open_episode
from simtoreal.data_collection.sensor_health import over_episodes


def summarize(path: str | Path) -> dict[str, Any]:
    """Everything ``simtoreal data info`` prints, JSON-compatible.

    Raises:
        DatasetError: the dataset is damaged.
    """
    dataset = Dataset.open(path)
    episodes, embodiment = dataset.episodes, dataset.embodiment
    steps = sum(episode.steps for episode in episodes)
    lengths = [episode.steps for episode in episodes]
    arrays: dict[str, dict[str, Any]] = {}
    if episodes:
        first = Path(str(episodes[0].path))
        with open_episode(first) as file:
            for name in array_names(file):
                row = file[name].shape[1:]
                size = int(np.prod(row, dtype=np.int64)) * file[name].dtype.itemsize * steps
                arrays[name] = {"shape": list(row), "dtype": str(file[name].dtype), "bytes": size}
    cameras = ", ".join(f"{c.name} {c.width}x{c.height}" for c in embodiment.cameras)
    return {
        "tasks": dict(Counter(episode.task for episode in episodes)) or dict.fromkeys(dataset.tasks, 0),
        "episodes": len(episodes),
        "steps": steps,
        "bytes": sum(file.stat().st_size for file in episode_files(Path(path))),
        "successes": sum(episode.success for episode in episodes),
        "failures": dict(Counter(episode.failure for episode in episodes if not episode.success)),
        "length_steps": [min(lengths), int(np.median(lengths)), max(lengths)] if lengths else [],
        "control_hz": embodiment.control_hz,
        "operators": dict(Counter(episode.operator for episode in episodes).most_common()),
        "sources": dict(Counter(episode.source for episode in episodes).most_common()),
        "instructions": dict(Counter(episode.instruction for episode in episodes).most_common()),
        "masks": {name: len(members) for name, members in dataset.masks.items()},
        "embodiment": f"{embodiment.name}, {embodiment.control_hz:g} Hz, cameras {cameras or 'none'} "
        f"({embodiment.render_profile})",
        "action": f"{embodiment.action.mode}: {' '.join(embodiment.action.names)}",
        "unfinished": sum(1 for _ in (Path(path) / EPISODES).glob("*.part")),
        "arrays": arrays,
        "sensors": over_episodes(episodes),
    }

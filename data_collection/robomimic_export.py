"""Writes robomimic's dataset: one HDF5 file with everything in it (robomimic 0.3, docs/datasets/overview).

What robomimic does not know is kept below names that it ignores: ``step/`` groups, the attribute ``episode`` of each
demo and the attribute ``simtoreal`` of ``data``. An import finds them again, so nothing is lost on a round trip.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo, array_names, open_episode
from simtoreal.data_collection.exchange import Progress, refuse_overwriting
from simtoreal.data_collection.new_hdf5_file import NewHdf5File
from simtoreal.data_collection.robomimic_import import SIDECAR
from simtoreal.data_collection.view import ROBOMIMIC_ENV_TYPE
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.files import atomic_path, explained_disk_errors


def export_robomimic(
    dataset: Dataset,
    output: Path,
    *,
    episodes: Sequence[EpisodeInfo] | None = None,
    next_obs: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write one robomimic file with everything in it and return its number of steps.

    It appears under its name only when it is complete. Masks keep their names; masks of episodes that are left out
    shrink, and vanish when they are empty.

    Args:
        dataset: to export.
        output: file to create.
        episodes: by default all.
        next_obs: also store ``next_obs`` (offline RL; doubles the size). The last observation is repeated.
        progress: see :data:`~simtoreal.data_collection.exchange.Progress`.

    Raises:
        DatasetError: the file exists, an episode is damaged, or the disk is full.
    """
    refuse_overwriting(output)
    chosen = list(dataset.episodes if episodes is None else episodes)
    safe = "No half-written file is left; free space and run the same command again."
    steps = 0
    with (
        explained_disk_errors(output, DatasetError, safe),
        atomic_path(output) as temporary,
        contextlib.closing(NewHdf5File(temporary)) as target,
    ):
        with h5py.File(target, "w", libver="latest") as file:
            data = file.create_group("data", track_order=True)
            for done, episode in enumerate(chosen):
                steps += _copy_demo(Path(str(episode.path)), episode, data, next_obs)
                target.check()
                if progress is not None:
                    progress(done + 1, len(chosen))
            data.attrs["total"] = steps
            data.attrs["env_args"] = json.dumps(_env_args(dataset))
            data.attrs[SIDECAR] = json.dumps({"embodiment": dataset.embodiment.to_dict(), "tasks": dataset.tasks})
            included = {episode.name for episode in chosen}
            for name, members in dataset.masks.items():
                kept = [f"demo_{int(member)}" for member in members if member in included]
                if kept:
                    file[f"mask/{name}"] = np.array(kept, dtype="S")
        target.check()
    return steps


def _copy_demo(path: Path, episode: EpisodeInfo, data: h5py.Group, next_obs: bool) -> int:
    demo = data.create_group(f"demo_{int(episode.name)}")
    # Read first: a full disk while writing must not be taken for damage of the episode.
    with open_episode(path) as source:
        arrays = {name: source[name][()] for name in array_names(source)}
    for name, rows in arrays.items():
        demo[name] = rows
        if next_obs and name.startswith("obs/"):
            demo[f"next_{name}"] = np.concatenate([rows[1:], rows[-1:]])
    demo.attrs["num_samples"] = episode.steps
    demo.attrs["episode"] = episode.to_json()
    if isinstance(model := episode.extra.get("model_file"), str):
        demo.attrs["model_file"] = model
    return episode.steps


def _env_args(dataset: Dataset) -> dict[str, Any]:
    """``env_args`` of the file that the data were imported from, or our own environment's."""
    task = next(iter(dataset.tasks.values()), {})
    if isinstance(given := task.get("env_args"), dict):
        return given
    names = list(dataset.tasks)
    env_kwargs = {"tasks": names, "control_freq": dataset.embodiment.control_hz}
    return {"env_name": names[0] if names else "", "type": ROBOMIMIC_ENV_TYPE, "env_kwargs": env_kwargs}

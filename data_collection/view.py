"""``dataset.hdf5``: the episodes of a dataset as robomimic sees them, by external links."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import h5py
import numpy as np

from simtoreal.data_collection.dataset import EPISODES, VIEW, Dataset
from simtoreal.data_collection.episode import disk_errors
from simtoreal.data_collection.new_hdf5_file import NewHdf5File
from simtoreal.envs.files import atomic_path

# robomimic 0.3.0 knows 1 (robosuite), 2 (gym) and 3 (iGibson); ours must be none of them.
ROBOMIMIC_ENV_TYPE = 101


def expected_view(dataset: Dataset) -> dict[str, Any]:
    """Return what the view has to hold: attributes ``data.<name>``, links ``data/demo_<i>``, lists ``mask/<name>``.

    Raises:
        DatasetError: a filter of the dataset is damaged.
    """
    task = next(iter(dataset.tasks), "")
    content: dict[str, Any] = {
        "data.total": sum(episode.steps for episode in dataset.episodes),
        "data.env_args": {
            "env_name": task,
            "type": ROBOMIMIC_ENV_TYPE,
            "env_kwargs": {"tasks": list(dataset.tasks)},
        },
    }
    for episode in dataset.episodes:
        content[f"data/demo_{int(episode.name)}"] = [f"{EPISODES}/{episode.name}.hdf5", "/"]
    for name, members in dataset.masks.items():
        content[f"mask/{name}"] = [f"demo_{int(member)}" for member in members]
    return content


def write_view(dataset: Dataset) -> None:
    """Write ``dataset.hdf5``: external links in robomimic's layout, with every mask.

    robomimic's ``SequenceDataset`` reads it with ``hdf5_use_swmr=False`` (its default opens the linked files for a
    concurrent writer, which finished files do not have).

    Raises:
        DatasetError: a filter is damaged, or the disk is full.
    """
    content, path = expected_view(dataset), dataset.path / VIEW
    with disk_errors(path), atomic_path(path) as temporary, contextlib.closing(NewHdf5File(temporary)) as target:
        with h5py.File(target, "w", libver="latest") as file:
            data = file.create_group("data")
            for name, value in content.items():
                if name.startswith("data/"):
                    file[name] = h5py.ExternalLink(*value)
                elif name.startswith("mask/"):
                    file[name] = np.array(value, dtype="S")
                else:
                    data.attrs[name.removeprefix("data.")] = json.dumps(value) if isinstance(value, dict) else value
        target.check()


def read_view(file: h5py.File) -> dict[str, Any]:
    """Return what an open view holds, in the form of :func:`expected_view`; whatever damaged files raise."""
    data = file["data"]
    content: dict[str, Any] = {
        "data.total": int(data.attrs["total"]),
        "data.env_args": json.loads(str(data.attrs["env_args"])),
    }
    for name in data:
        link = data.get(name, getlink=True)
        external = isinstance(link, h5py.ExternalLink)
        content[f"data/{name}"] = [link.filename, link.path] if external else type(link).__name__
    for name in file.get("mask", ()):
        content[f"mask/{name}"] = [member.decode() for member in file[f"mask/{name}"][()]]
    return content

"""A small dataset with everything that an exchange format has to carry, and comparisons of datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, embodiment_digest
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.panda import panda_embodiment

TASK = {"name": "sort", "version": 3}
LENGTHS = (9, 14, 1)


def pictures(steps: int, size: int, phase: int) -> np.ndarray:
    """Smooth moving pictures ``(steps, size, size, 3)``, which a video codec changes little."""
    rows, columns = np.mgrid[:size, :size] / size
    moving = [np.sin(rows + columns * k + 0.2 * t + phase) for t in range(steps) for k in (0, 1, 2)]
    stacked = np.stack(moving).reshape(steps, 3, size, size).transpose(0, 2, 3, 1)
    return np.rint(120 + 60 * stacked).astype(np.uint8)


def episode_arrays(number: int, size: int) -> Arrays:
    """Arrays of episode ``number``: skewed, of every type, and not the same set in every episode."""
    steps = LENGTHS[number]
    rng = np.random.default_rng(number)
    arrays: Arrays = {
        "actions": rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        "rewards": (np.arange(steps) == steps - 1).astype(np.float32),
        "dones": ((np.arange(steps) == steps - 1) & (number != 2)).astype(np.int8),
        "states": rng.normal(size=(steps, 5)),
        "obs/front_image": pictures(steps, size, number),
        "obs/wrist_image": pictures(steps, size, number + 1),
        "obs/proprio": (rng.exponential(size=(steps, 20)) ** (1 + number)).astype(np.float32),
        "obs/object_state": rng.normal(size=(steps, 7)).astype(np.float32),
        "step/target": rng.normal(size=(steps, 10)),
        "step/matrix": rng.normal(size=(steps, 2, 3)),
        "step/contacts": rng.integers(0, 2, (steps, 2)).astype(np.uint8),
        "step/engaged": rng.integers(0, 2, steps).astype(bool),
        "step/timestamp_ns": 10**15 + np.arange(steps, dtype=np.int64) * 50_000_000 + number,
        "step/instruction": np.zeros(steps, dtype=np.int32),
    }
    if number == 1:
        arrays["step/instruction"][5:] = 1
        arrays["step/likelihood"] = rng.random(steps).astype(np.float32)
    return arrays


def make_dataset(path: Path, *, size: int = 16) -> Dataset:
    """Three episodes of 9, 14 and 1 steps; the second changes its instruction, the third failed."""
    embodiment = panda_embodiment(size)
    with DatasetWriter(path, embodiment, {"sort": TASK}) as writer:
        for number in range(len(LENGTHS)):
            texts = ("sort by colour", "sort by size") if number == 1 else ("sort by colour",)
            info = EpisodeInfo(
                task="sort", seed=100 + number, success=number != 2, failure="timeout" if number == 2 else "",
                operator=f"person {number}", source="teleop", embodiment=embodiment_digest(embodiment),
                instruction=texts[-1], instructions=texts, milestones={"half": True}, columns={"contacts": ("a", "b")},
                started="2026-01-02T03:04:05.678+00:00", duration_s=LENGTHS[number] / 20, extra={"motion": {"u": 0.25}},
            )  # fmt: skip
            writer.add(episode_arrays(number, size), info)
    return Dataset.open(path)


def assert_same(given: Dataset, expected: Dataset, *, lossy_images_db: float | None = None) -> None:
    """Equal in every description, array, type and bit; images at least ``lossy_images_db`` PSNR if that is given."""
    assert given.embodiment == expected.embodiment
    assert given.tasks == expected.tasks
    assert {k: v for k, v in given.masks.items() if k in expected.masks} == expected.masks
    for mine, theirs in zip(given.episodes, expected.episodes, strict=True):
        assert json.loads(mine.to_json()) == json.loads(theirs.to_json())
        ours, wanted = given.read(mine), expected.read(theirs)
        assert ours.keys() == wanted.keys()
        for name, array in wanted.items():
            assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
            if lossy_images_db is not None and name.endswith("_image"):
                error = np.mean((ours[name].astype(float) - array) ** 2)
                assert 10 * np.log10(255**2 / error) > lossy_images_db, name
            else:
                np.testing.assert_array_equal(ours[name], array, err_msg=name)

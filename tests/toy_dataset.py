"""Small datasets of a robot that moves at random, for tests of the care of datasets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo, embodiment_digest
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.panda import panda_embodiment

EMBODIMENT = panda_embodiment(16)
TASKS = {"toy": {"name": "toy", "horizon": 40}}


def make_episode(seed: int, steps: int = 20, rest: int = 0) -> tuple[dict[str, np.ndarray], EpisodeInfo]:
    """An episode that moves all the time, after ``rest`` steps in which nothing happens."""
    generator = np.random.default_rng(seed)
    image = (steps, 16, 16, 3)
    actions = generator.uniform(-0.9, 0.9, (steps, 7)).astype(np.float32)
    actions[:, 6] = 1
    proprio = np.cumsum(generator.normal(0, 0.02, (steps, 20)), axis=0).astype(np.float32)
    actions[:rest, :6] = 0
    proprio[: rest + 1] = proprio[rest]
    arrays = {
        "actions": actions,
        "rewards": np.zeros(steps, np.float32),
        "dones": np.zeros(steps, np.int8),
        "states": generator.normal(size=(steps, 5)),
        "obs/front_image": generator.integers(0, 256, image, dtype=np.uint8),
        "obs/wrist_image": generator.integers(0, 256, image, dtype=np.uint8),
        "obs/proprio": proprio,
        "step/target": generator.normal(size=(steps, 10)),
        "step/timestamp_ns": np.arange(steps) * 50_000_000,
        "step/instruction": np.zeros(steps, np.int32),
    }
    info = EpisodeInfo(
        task="toy", seed=seed, success=True, operator="ann", source="teleop",
        embodiment=embodiment_digest(EMBODIMENT), instruction="do it", instructions=("do it",),
        duration_s=steps * 0.05, extra={"score": seed},
    )  # fmt: skip
    return arrays, info


def make_dataset(path: Path, episodes: int = 6, first_seed: int = 0, steps: int = 15, rest: int = 0) -> Dataset:
    with DatasetWriter(path, EMBODIMENT, TASKS) as writer:
        for seed in range(first_seed, first_seed + episodes):
            writer.add(*make_episode(seed, steps + seed % 4, rest))
    return Dataset.open(path)

"""How fast a training step is: our trainer against a plain loop over the same model and the same batch.

    python benchmarks/train_step.py

The peer is what imitation-learning repositories do: float32, images as (N, C, H, W), AdamW with its defaults (on a CPU
a Python loop over the parameters), and an exponential moving average updated parameter by parameter.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import read_no_flags, speed_arms, speed_headline, time_rounds, write_benchmark

from simtoreal.data_collection.windows import WindowSampler
from simtoreal.envs.panda import panda_embodiment
from simtoreal.policies.averaging import average_decay
from simtoreal.policies.config import DiffusionConfig, TrainerConfig
from simtoreal.policies.distributed import Processes
from simtoreal.policies.trainer import Training
from simtoreal.policies.training_data import TrainingData, fit_all, to_tensors

OURS, PEER = "simtoreal trainer", "plain fp32 loop"
SIZE, EPISODE_STEPS, EPISODES, STEPS, ROUNDS = 64, 70, 4, 2, 9


def synthetic_data(config: DiffusionConfig) -> TrainingData:
    """Random windows with the shapes of pick_place from two cameras."""
    rng = np.random.default_rng(0)
    image = (EPISODE_STEPS, SIZE, SIZE, 3)
    episodes = [
        {
            "obs/front_image": rng.integers(0, 256, image, dtype=np.uint8),
            "obs/wrist_image": rng.integers(0, 256, image, dtype=np.uint8),
            "obs/proprio": rng.standard_normal((EPISODE_STEPS, 20)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (EPISODE_STEPS, 7)).astype(np.float32),
        }
        for _ in range(EPISODES)
    ]
    windows = WindowSampler(episodes, None, config.observation_steps, config.horizon, config.keys)
    embodiment = panda_embodiment(SIZE)
    statistics = fit_all(windows, embodiment, config)
    return TrainingData(
        embodiment=embodiment, task={}, train=windows, valid=None, statistics=statistics, source="synthetic"
    )


class PlainLoop:
    """The peer: one model, one optimiser, one average, nothing fused."""

    def __init__(self, training: Training, settings: TrainerConfig) -> None:
        self.policy = copy.deepcopy(training.policy).to(memory_format=torch.contiguous_format).train()
        self.average = copy.deepcopy(self.policy)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=settings.learning_rate, foreach=False)
        self.settings, self.updates = settings, 0

    def take_step(self, batch: dict[str, Any]) -> None:
        """Change the weights by one batch."""
        self.optimizer.zero_grad()
        self.policy.loss(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_gradient_norm)
        self.optimizer.step()
        decay = average_decay(self.updates)
        self.updates += 1
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.policy.parameters(), strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)


def main() -> None:
    """Run and store the measurement."""
    begin = time.perf_counter()
    config, settings = DiffusionConfig(), TrainerConfig()
    data = synthetic_data(config)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        training = Training(config, settings, data, Path(folder), Processes(0, 1, cpu), resume=False, progress=False)
    plain = PlainLoop(training, settings)
    batch = to_tensors(data.train.batch(np.arange(settings.batch_size)), cpu)

    def ours() -> None:
        for _ in range(STEPS):
            training.take_step(batch)

    def peer() -> None:
        for _ in range(STEPS):
            plain.take_step(batch)

    seconds = time_rounds({OURS: ours, PEER: peer}, ROUNDS)
    units = {OURS: float(STEPS), PEER: float(STEPS)}
    headline = speed_headline("training steps/s", seconds, units, OURS, PEER)
    path = write_benchmark(
        "train_step",
        "How much faster is a training step of the default diffusion policy than in a plain fp32 loop?",
        headline,
        speed_arms(seconds, units),
        seconds=time.perf_counter() - begin,
        seeds=[settings.seed],
        notes=f"Batch {settings.batch_size}, two {SIZE}-pixel cameras, {torch.get_num_threads()} threads, "
        f"precision {training.precision}; same model, batch and clipping on both sides.",
    )
    print(f"{headline['ratio']:.2f}x the plain loop ({headline['ours']:.1f} steps/s); stored in {path}")


if __name__ == "__main__":
    read_no_flags(__doc__)
    main()

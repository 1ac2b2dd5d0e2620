"""A tiny image task without physics: move to the coloured square that only the camera shows."""

from __future__ import annotations

import numpy as np

from simtoreal.data_collection.windows import WindowSampler
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.panda import panda_embodiment
from simtoreal.policies.config import DiffusionConfig, PolicyConfig, TrainerConfig, VisionConfig
from simtoreal.policies.training_data import TrainingData, fit_all

SIZE = 24
LIMIT_M = 0.02


def embodiment(size: int = SIZE) -> Embodiment:
    return panda_embodiment(size, cameras=("front",))


def small_vision() -> VisionConfig:
    return VisionConfig(widths=(8, 16, 16), keypoints=8, features=32)


def small_diffusion(**changes) -> DiffusionConfig:
    values = {
        "image_keys": ("front_image",), "vision": small_vision(), "horizon": 8, "execute_steps": 4,
        "unet_widths": (16, 32), "condition_width": 32, "transformer_width": 64, "transformer_layers": 1,
    }  # fmt: skip
    return DiffusionConfig(**{**values, **changes})


def small_trainer(**changes) -> TrainerConfig:
    values = {
        "steps": 6, "batch_size": 8, "warmup_steps": 2, "checkpoint_every": 2, "validate_every": 3, "log_every": 1,
        "validation_windows": 16,
    }  # fmt: skip
    return TrainerConfig(**{**values, **changes})


def draw(goal: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Image (size, size, 3) with a red square at ``goal`` in [-1, 1]^2."""
    image = np.full((size, size, 3), 90, dtype=np.uint8)
    row, column = ((goal + 1) / 2 * (size - 7) + 2).astype(int)
    image[row : row + 4, column : column + 4] = (220, 40, 40)
    return image


def episode(rng: np.random.Generator, size: int = SIZE, steps: int = 14) -> dict[str, np.ndarray]:
    goal, place = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
    proprio, actions = np.zeros((steps, 20), dtype=np.float32), np.zeros((steps, 7), dtype=np.float32)
    for step in range(steps):
        proprio[step, :2] = 0.2 * place
        move = np.clip((goal - place) * 5, -1, 1)
        actions[step, :2] = move
        actions[step, 6] = 1.0 if np.abs(goal - place).max() > 0.1 else -1.0
        place = place + 0.1 * move
    image = np.repeat(draw(goal, size)[None], steps, axis=0)
    return {"obs/front_image": image, "obs/proprio": proprio, "actions": actions}


def data(config: PolicyConfig, episodes: int = 12, size: int = SIZE, seed: int = 0) -> TrainingData:
    rng = np.random.default_rng(seed)
    recorded = [episode(rng, size) for _ in range(episodes)]

    def windows(chosen: list[dict[str, np.ndarray]]) -> WindowSampler:
        return WindowSampler(chosen, None, config.observation_steps, config.horizon, config.keys)

    held_out = max(1, episodes // 6)
    train = windows(recorded[held_out:])
    return TrainingData(
        embodiment=embodiment(size),
        task={"name": "toy"},
        train=train,
        valid=windows(recorded[:held_out]),
        statistics=fit_all(train, embodiment(size), config),
        source="toy",
    )

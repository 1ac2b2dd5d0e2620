"""Inverse-dynamics model: the action that leads from one picture to another one a fifth of a second later.

Brandfonbrener et al. 2023 (arXiv 2305.16985) train it to learn a representation: what an action changes in a picture
depends on the dynamics and not on which task a demonstrator had in mind. Here its image encoders can initialise those
of a policy (:mod:`simtoreal.policies.encoder_transfer`), and it judges whether imagined videos obey their actions
(RLIR, arXiv 2509.23958). It is no policy, but is trained, saved and loaded as one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simtoreal.envs.embodiment import Embodiment
from simtoreal.policies.base import Generators, Policy
from simtoreal.policies.checkpoint import LoadedPolicy, load_policy
from simtoreal.policies.encoders import ObservationEncoder
from simtoreal.policies.inverse_dynamics_config import InverseDynamicsConfig
from simtoreal.policies.normalization import ACTIONS, Statistics
from simtoreal.policies.training_data import Windows, to_tensors

GRIPPER = "gripper"
# Pairs looked at together.
BATCH = 256


def gap_steps(config: InverseDynamicsConfig, embodiment: Embodiment) -> int:
    """Control steps between the two frames of a pair."""
    return max(1, round(embodiment.control_hz / config.pair_hz))


class InverseDynamics(Policy):
    """Encoders of both frames, then a perceptron that tells the mean action between them.

    The mean is what two frames determine; the order of the single actions they do not.

    Attributes:
        gap: control steps between the frames.
        lag: control steps by which the motion follows the action.
        gripper: column of the gripper in the action, None without one.
    """

    config_type = InverseDynamicsConfig
    config: InverseDynamicsConfig

    def __init__(
        self, config: InverseDynamicsConfig, embodiment: Embodiment, statistics: Mapping[str, Statistics]
    ) -> None:
        super().__init__(config, embodiment, statistics)
        self.gap, self.lag = gap_steps(config, embodiment), config.lag_steps or 0
        names = embodiment.action.names
        self.gripper = names.index(GRIPPER) if GRIPPER in names else None
        vision, width = dataclasses.replace(config.vision, image_steps=2), config.hidden
        self.encoder = ObservationEncoder(config, vision, config.augmentation, self.normalizer, width)
        layers: list[nn.Module] = [nn.GELU()]
        for _ in range(config.layers):
            layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Linear(width, self.normalizer.dim(ACTIONS)))

    def normalized(self, observation: dict[str, Tensor]) -> Tensor:
        """Return normalised mean actions ``(B, A)`` for frames ``(B, 2, H, W, 3)`` per camera, values 0 to 255.

        The frames may be floats with a gradient.
        """
        action: Tensor = self.head(self.encoder(observation)).float()
        return action

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean squared error of the normalised mean action."""
        wanted = self.normalizer.normalize(ACTIONS, batch["actions"][:, 0])
        return {"loss": (self.normalized(batch["observation"]) - wanted).square().mean()}

    def predict(self, observation: dict[str, Tensor], instruction: Sequence[str], generator: Generators) -> Tensor:
        """Return mean actions ``(B, 1, A)`` in the environment's units; deterministic."""
        return self.actions_from_normalized(self.normalized(observation))[:, None]


def load_inverse_dynamics(path: str | Path, device: str | torch.device = "cpu") -> tuple[InverseDynamics, LoadedPolicy]:
    """Load a model from a run or checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, or not an inverse-dynamics model.
    """
    loaded = load_policy(path, device, kind=InverseDynamics)
    assert isinstance(loaded.policy, InverseDynamics)
    return loaded.policy, loaded


def pair_starts(starts: np.ndarray, ends: np.ndarray, gap: int, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first frame and the episode ``(P,)`` of every pair inside an episode.

    Args:
        starts, ends: ``(E,)`` range of frames of every episode.
        gap: control steps between the frames.
        lag: the actions of a pair begin this many steps before its first frame, and must be in the episode as well.
    """
    first = [np.arange(start + lag, end - gap) for start, end in zip(starts, ends, strict=True)]
    episode = np.repeat(np.arange(len(starts)), [len(one) for one in first])
    return np.concatenate(first) if first else np.zeros(0, np.int64), episode


def mean_actions(actions: np.ndarray, first: np.ndarray, gap: int, lag: int) -> np.ndarray:
    """Return the mean action ``(P, A)`` float32 of pairs that begin at the frames ``first``; actions ``(N, A)``."""
    total = np.concatenate([np.zeros((1, actions.shape[1])), np.cumsum(actions, axis=0, dtype=np.float64)])
    return ((total[first - lag + gap] - total[first - lag]) / gap).astype(np.float32)


@torch.inference_mode()
def predict_windows(model: Policy, windows: Windows) -> np.ndarray:
    """Return the predictions ``(P, D)`` float32 of a model that predicts one vector per sample."""
    model.eval()
    found = [
        model.predict(to_tensors(windows.batch(part), model.device)["observation"], [], None)[:, 0].float().cpu()
        for part in np.array_split(np.arange(len(windows)), math.ceil(len(windows) / BATCH))
        if len(part)
    ]
    return torch.cat(found).numpy()

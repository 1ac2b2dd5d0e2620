"""The reward of RLIR (arXiv 2509.23958): does an inverse-dynamics model read the commanded action from the video?

For continuous actions a pair of frames earns

    (1 - w) exp(-mean_d ((a^_d - a_d) / sigma_d)^2) + w [sign of the gripper read right],

where sigma_d is what the model is off on real video that it did not learn from: a video that shows its action as well
as a real one earns about 1/e and more, and nothing is gained in dimensions that cannot be read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.inverse_dynamics import InverseDynamics
from simtoreal.world_models.action_following import UNDECIDED, clip_pairs, read_actions
from simtoreal.world_models.clips import Clips

# A deviation of zero (a dimension that never varies) must not divide.
SMALLEST_DEVIATION = 0.01
BATCH = 128


def require_whole_pairs(model: InverseDynamics, steps: int) -> None:
    """Refuse videos that are not cut into whole pairs of frames.

    Raises:
        ConfigError: ``steps`` is not a multiple of the steps between frames.
    """
    if steps % model.gap:
        raise ConfigError(
            f"--posttrain.steps is {steps}; the inverse-dynamics model compares frames {model.gap} steps apart, so a "
            f"multiple of {model.gap} is needed"
        )


class InverseReward:
    """Rewards videos.

    Args:
        model: inverse-dynamics model.
        real: real videos that it did not learn from.
        gripper_weight: w.

    Attributes:
        deviation: ``(A,)`` sigma.
    """

    def __init__(self, model: InverseDynamics, real: Clips, gripper_weight: float) -> None:
        self.model = model.eval().requires_grad_(False)
        found = read_actions(model, clip_pairs(model, real))
        deviation = torch.tensor(found["deviation"], device=model.device).float()
        self.deviation = deviation.clamp_min(SMALLEST_DEVIATION)
        self.gripper_weight = gripper_weight if model.gripper is not None else 0.0
        moving = torch.ones(len(self.deviation), dtype=torch.bool, device=model.device)
        if model.gripper is not None:
            moving[model.gripper] = False
        self.moving = moving

    def of_pairs(self, read: Tensor, wanted: Tensor) -> Tensor:
        """Return the reward ``(P,)`` of actions read from videos ``(P, A)`` against those commanded ``(P, A)``."""
        error = ((read - wanted) / self.deviation).square()[:, self.moving].mean(-1)
        reward = (1 - self.gripper_weight) * torch.exp(-error)
        if self.model.gripper is not None and self.gripper_weight:
            told, commanded = read[:, self.model.gripper], wanted[:, self.model.gripper]
            right = (torch.sign(told) == torch.sign(commanded)) | (commanded.abs() <= UNDECIDED)
            reward = reward + self.gripper_weight * right.float()
        return reward

    def read(self, images: Tensor) -> Tensor:
        """Return actions ``(N, pairs, A)`` read from videos ``(N, K + 1, V, H, W, 3)``, values 0 to 255.

        The frames may be floats with a gradient, which then flows.
        """
        model = self.model
        index = [model.embodiment.image_keys.index(key) for key in model.config.image_keys]
        first = torch.arange(0, images.shape[1] - model.gap, model.gap)
        pairs = torch.stack([images[:, first], images[:, first + model.gap]], 2).flatten(0, 1)
        observation = {
            key: pairs[:, :, view].contiguous() for key, view in zip(model.config.image_keys, index, strict=True)
        }
        normalized = model.normalized(observation)
        return model.normalizer.denormalize("actions", normalized).unflatten(0, (len(images), -1))

    @torch.no_grad()
    def __call__(self, images: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean reward ``(N,)`` of videos ``(N, K + 1, V, H, W, 3)`` for mean actions ``(N, pairs, A)``."""
        rewards = []
        for part in torch.arange(len(images)).split(BATCH):
            read = self.read(images[part])
            rewards.append(self.of_pairs(read.flatten(0, 1), wanted[part].flatten(0, 1)).view(len(part), -1).mean(-1))
        return torch.cat(rewards)

    def error(self, images: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean squared error of the actions read, in units of sigma; differentiable in ``images``."""
        return ((self.read(images) - wanted) / self.deviation).square().mean()

    def of_clips(self, clips: Clips, read: np.ndarray, wanted: np.ndarray, episode: np.ndarray) -> np.ndarray:
        """Return the mean reward ``(E,)`` of every video, NaN without pairs, for actions read from its pairs."""
        device = self.deviation.device
        reward = self.of_pairs(torch.from_numpy(read).to(device), torch.from_numpy(wanted).to(device)).cpu().numpy()
        counts = np.bincount(episode, minlength=len(clips.episodes)).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return np.bincount(episode, reward, minlength=len(clips.episodes)) / counts

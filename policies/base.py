"""What a policy is: a module that learns from window batches and predicts action chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, closest
from simtoreal.policies.config import PolicyConfig
from simtoreal.policies.normalization import ACTIONS, Normalizer, Statistics

# One generator for the whole batch, or one per row so that an episode's noise does not depend on its neighbours.
Generators = torch.Generator | Sequence[torch.Generator] | None


class Policy(nn.Module, ABC):
    """Base of every policy.

    Args:
        config: settings of the policy.
        embodiment: robot, cameras and actions it is made for.
        statistics: normalisation bounds of ``actions`` and of every vector key in ``config.state_keys``.

    Raises:
        ConfigError: the embodiment lacks a camera that the config reads.
    """

    config_type: ClassVar[type[PolicyConfig]]

    def __init__(self, config: PolicyConfig, embodiment: Embodiment, statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        for key in config.image_keys:
            if key not in embodiment.image_keys:
                raise ConfigError(
                    f"policy.image_keys holds '{key}', which embodiment '{embodiment.name}' does not have. "
                    f"{closest(key, embodiment.image_keys)}"
                )
        self.config = config
        self.embodiment = embodiment
        self.normalizer = Normalizer(statistics)

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the training loss.

        Args:
            batch: ``observation`` ``{key: (B, observation_steps, ...)}`` (images uint8 ``(H, W, 3)``, vectors
                float32), ``actions`` float32 ``(B, horizon, A)``, ``action_mask`` bool ``(B, horizon)`` (False
                after the end of the episode), ``instruction`` list of B strings.

        Returns:
            ``{"loss": scalar, ...}``; further scalars are logged.
        """

    @abstractmethod
    def predict(self, observation: dict[str, Tensor], instruction: Sequence[str], generator: Generators) -> Tensor:
        """Return action chunks ``(B, horizon, A)`` float32 in the environment's action units.

        Nothing may be remembered between calls: their rows are whichever episodes need a chunk at that moment. What a
        policy has to know of the past is in the ``observation_steps``.

        Args:
            observation: ``(B, observation_steps, ...)`` per key of ``config.keys``, oldest first.
            instruction: one per row.
            generator: source of the noise; None uses torch's global one.
        """

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Same as :meth:`loss`; DistributedDataParallel needs it under this name."""
        return self.loss(batch)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def actions_from_normalized(self, normalized: Tensor) -> Tensor:
        """Return actions in the environment's units; ``ee_delta`` is kept inside its bounds of [-1, 1]."""
        actions = self.normalizer.denormalize(ACTIONS, normalized)
        return actions.clamp(-1.0, 1.0) if self.embodiment.action.mode == "ee_delta" else actions


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``error`` ``(..., T, A)`` over the time steps where ``mask`` ``(..., T)`` is True."""
    weight = mask.to(error.dtype)
    return (error.mean(-1) * weight).sum() / weight.sum().clamp_min(1.0)


def normal_noise(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Return standard normal noise ``shape`` on ``device``, drawn row by row when there is a generator per row.

    Drawn on the generator's device (normally the CPU), so that results do not depend on the accelerator.
    """
    if generator is None:
        return torch.randn(*shape, device=device)
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, device=generator.device).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} rows")
    rows = [torch.randn(*shape[1:], generator=one, device=one.device) for one in generator]
    return torch.stack(rows).to(device)

"""Behaviour cloning by regression of the whole chunk: the baseline that every other policy must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from simtoreal.envs.embodiment import Embodiment
from simtoreal.policies.base import Generators, Policy, masked_mean
from simtoreal.policies.config import BCConfig
from simtoreal.policies.encoders import ObservationEncoder
from simtoreal.policies.normalization import ACTIONS, Statistics


class BCPolicy(Policy):
    """Multilayer perceptron on the encoded observation, trained with the L1 (Zhao et al. 2023, §IV) or L2 loss."""

    config_type = BCConfig
    config: BCConfig

    def __init__(self, config: BCConfig, embodiment: Embodiment, statistics: Mapping[str, Statistics]) -> None:
        super().__init__(config, embodiment, statistics)
        self.action_dim = self.normalizer.dim(ACTIONS)
        width = config.hidden
        self.encoder = ObservationEncoder(config, config.vision, config.augmentation, self.normalizer, width)
        layers: list[nn.Module] = [nn.GELU()]
        for _ in range(config.layers):
            layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Linear(width, config.horizon * self.action_dim))

    def _chunk(self, observation: dict[str, Tensor]) -> Tensor:
        flat = self.head(self.encoder(observation)).float()
        return flat.view(-1, self.config.horizon, self.action_dim)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean absolute or squared error of the normalised chunk."""
        target = self.normalizer.normalize(ACTIONS, batch["actions"])
        error = self._chunk(batch["observation"]) - target
        distance = error.abs() if self.config.loss == "l1" else error.square()
        return {"loss": masked_mean(distance, batch["action_mask"])}

    def predict(self, observation: dict[str, Tensor], instruction: Sequence[str], generator: Generators) -> Tensor:
        """Return chunks ``(B, horizon, A)``; the policy is deterministic and uses no generator."""
        return self.actions_from_normalized(self._chunk(observation))

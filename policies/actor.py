"""A policy as the actor of a rollout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simtoreal.envs.errors import ConfigError
from simtoreal.envs.rollout import Observation
from simtoreal.policies.base import Policy


class PolicyActor:
    """Predicts chunks for all asking environments in one batch.

    The noise of an episode comes from its own generator, seeded by ``seed`` and the episode's seed: neither the number
    of environments nor the slot that an episode lands in changes it. Only ``policy.config.keys`` of the observation
    are read.

    Args:
        policy: see :class:`Policy`; it is put into evaluation mode, and only acts in its own embodiment.
        seed: of the noise.
        execute_steps: actions taken from each chunk, by default those of the policy's config.
        ensembling: decay m of temporal ensembling (ACT, Zhao et al. 2023: weights exp(-m i)); None turns it off.

    Raises:
        ConfigError: ``execute_steps`` is not between 1 and the horizon, or ``ensembling`` is negative.
    """

    def __init__(
        self, policy: Policy, seed: int = 0, *, execute_steps: int | None = None, ensembling: float | None = None
    ) -> None:
        self.policy = policy.eval()
        self.embodiment = policy.embodiment
        self.seed = seed
        self.observation_steps = policy.config.observation_steps
        self.execute_steps = policy.config.execute_steps if execute_steps is None else execute_steps
        self.ensembling = ensembling
        self._generators: dict[int, torch.Generator] = {}
        if not 1 <= self.execute_steps <= policy.config.horizon:
            raise ConfigError(
                f"execute_steps is {execute_steps}; expected 1 to the policy's horizon ({policy.config.horizon})"
            )
        if ensembling is not None and ensembling < 0:
            raise ConfigError(f"ensembling is {ensembling}; expected a decay of at least 0")

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """Begin episodes with the given seeds in ``slots``."""
        for slot, seed in zip(slots, seeds, strict=True):
            mixed = np.random.SeedSequence([self.seed, int(seed)]).generate_state(1, np.uint64)[0]
            self._generators[int(slot)] = torch.Generator().manual_seed(int(mixed))

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """Return float32 chunks ``(len(slots), horizon, action_dim)``; see :class:`simtoreal.envs.rollout.Actor`.

        Raises:
            ConfigError: the observation lacks a key that the policy reads.
        """
        config, device = self.policy.config, self.policy.device
        for key in config.keys:
            if key not in observation:
                raise ConfigError(
                    f"the policy reads '{key}', but the environment gives {sorted(observation)}. "
                    "Make the environment with the cameras and the kind of observation of the training data."
                )
        tensors = {key: torch.from_numpy(np.ascontiguousarray(observation[key])).to(device) for key in config.keys}
        generators = [self._generators[int(slot)] for slot in slots]
        with torch.inference_mode():
            chunks = self._predict(tensors, list(instructions), generators)
        return chunks.float().cpu().numpy()

    def _predict(
        self, observation: dict[str, Tensor], instructions: list[str], generators: list[torch.Generator]
    ) -> Tensor:
        return self.policy.predict(observation, instructions, generators)

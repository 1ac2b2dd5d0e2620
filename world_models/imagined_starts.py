"""Where the rollouts of each iteration begin: first frames of real episodes, and key frames in a fixed proportion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.base import Policy
from simtoreal.policies.chunk_rollout import ChunkRollouts, Starts
from simtoreal.policies.reinforcement import Anchor, Reinforcement
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.policies.training_data import batch_indices
from simtoreal.world_models.keyframes import Keyframe
from simtoreal.world_models.video_data import VideoData

# Kinds of draws that follow from the same seed.
_BEGINNINGS, _KEYFRAMES = 11, 12
# 0.333... of three groups is one, whatever floating point makes of it.
_ROUNDING = 1e-9


class ImaginedStarts:
    """Starts of imagined rollouts; calling it with a learner gives those of its current iteration.

    Every beginning, and every key frame, is used once before one is used again, and the share of groups that begin in a
    key frame is exact over all iterations.

    Attributes:
        places: ``(episode, step)`` of every context, for
            :class:`~simtoreal.world_models.vector_env.WorldModelVectorEnv`: the beginnings, then the key frames.

    Args:
        data: real episodes.
        keyframes: of these episodes.
        share: of the groups that begin in a key frame; 0 if there are no key frames.
        seed: decides the order.

    Raises:
        ConfigError: key frames are asked for, but none was found.
    """

    def __init__(self, data: VideoData, keyframes: Sequence[Keyframe], share: float, seed: int) -> None:
        if share > 0 and not keyframes:
            raise ConfigError(
                f"no key frame was found in {len(data.ends)} episodes: nothing touches anything, the gripper never "
                "moves, or every event is too close to a success or to the end. Set keyframes.share to 0, or lower "
                "keyframes.margin_steps and keyframes.remaining_steps."
            )
        self.beginnings, self.share, self.seed = len(data.ends), share, seed
        self.keyframes = len(keyframes) if share > 0 else 0
        self.places = [(episode, 0) for episode in range(self.beginnings)]
        self.places += [(one.episode, one.step) for one in keyframes[: self.keyframes]]

    def __call__(self, learner: Reinforcement) -> Starts:
        """Return the starts of the learner's current iteration."""
        config, iteration = learner.config, learner.iteration
        times = config.grpo.group_size if config.algorithm == "grpo" else 1
        groups = config.rollouts // times
        first, last = (math.floor(number * groups * self.share + _ROUNDING) for number in (iteration, iteration + 1))
        chosen = [self.beginnings + one for one in self._draw(self.keyframes, first, last, _KEYFRAMES)]
        begun = iteration * groups - first
        chosen += self._draw(self.beginnings, begun, begun + groups - (last - first), _BEGINNINGS)
        # The seed modulo the number of contexts is the context; the rest makes the noise of the model another one.
        rounds = iteration * groups + np.arange(groups)
        seeds = np.array(chosen) + len(self.places) * rounds
        return Starts.repeated([int(seed) for seed in seeds], times)

    def is_keyframe(self, seeds: np.ndarray) -> np.ndarray:
        """Whether rollouts with these seeds began in a key frame."""
        return np.asarray(np.asarray(seeds) % len(self.places) >= self.beginnings)

    def _draw(self, count: int, first: int, last: int, kind: int) -> list[int]:
        """Elements ``first`` to ``last`` of an endless sequence of permutations of ``count`` contexts."""
        seed = int(np.random.SeedSequence([self.seed, kind]).generate_state(1)[0])
        return [int(batch_indices(count, 1, seed, position)[0]) for position in range(first, last)]


class ImaginedReinforcement(Reinforcement):
    """Reinforcement that also reports the success of rollouts from first frames and from key frames apart.

    Args:
        policy, config, anchor: see :class:`Reinforcement`.
        starts: where the rollouts begin.
    """

    def __init__(
        self, policy: Policy, config: ReinforcementConfig, starts: ImaginedStarts, anchor: Anchor | None
    ) -> None:
        super().__init__(policy, config, anchor=anchor)
        self._starts = starts

    def update(self, rollouts: ChunkRollouts) -> dict[str, Any]:
        """See :meth:`Reinforcement.update`."""
        metrics: dict[str, Any] = super().update(rollouts)
        success, keyframe = rollouts.success.numpy(), self._starts.is_keyframe(rollouts.seeds.numpy())
        for name, rows in (("beginnings", ~keyframe), ("keyframes", keyframe)):
            metrics[f"rollouts_from_{name}"] = int(rows.sum())
            if rows.any():
                metrics[f"success_from_{name}"] = float(success[rows].mean())
        return metrics

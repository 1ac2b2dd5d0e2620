"""Where the rollouts of each iteration begin: first frames of real episodes, and key frames in a fixed proportion.

A group of rollouts that all succeed, or all fail, teaches nothing (GRPO), and in a deterministic imagination most are
like that. Sampling on until enough groups differ (DAPO, Yu et al. 2025, §3.2) would cost several times the rollouts.
Here a share of the groups begins where the last group differed (sampling for learnability, Foster & Foerster 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.base import Policy
from simtoreal.policies.chunk_rollout import ChunkRollouts, Starts
from simtoreal.policies.reinforcement import Anchor, Reinforcement
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.policies.training_data import batch_indices
from simtoreal.world_models.keyframes import Keyframe
from simtoreal.world_models.video_data import VideoData

# Kinds of draws that follow from the same seed.
_BEGINNINGS, _KEYFRAMES, _FRONTIER = 11, 12, 13
# 0.333... of three groups is one, whatever floating point makes of it.
_ROUNDING = 1e-9


class ImaginedStarts:
    """Starts of imagined rollouts; calling it with a learner gives those of its current iteration.

    The share of groups that begin in a key frame is exact over all iterations. Of the beginnings, and of the key
    frames, ``frontier_share`` of the groups repeat places where the last group both succeeded and failed, as far as
    there are such; among the others every place is used once before one is used again.

    Attributes:
        last: ``(contexts,)`` success of the last group from every context, -1 if there was none.
        drawn: ``(2,)`` beginnings and key frames that were not repetitions, so far.
        places: ``(episode, step)`` of every context, for
            :class:`~simtoreal.world_models.vector_env.WorldModelVectorEnv`: the beginnings, then the key frames.

    Args:
        data: real episodes.
        keyframes: of these episodes.
        share: of the groups that begin in a key frame; 0 if there are no key frames.
        seed: decides the order.
        frontier_share: see above.

    Raises:
        ConfigError: key frames are asked for, but none was found.
    """

    def __init__(
        self, data: VideoData, keyframes: Sequence[Keyframe], share: float, seed: int, frontier_share: float = 0.0
    ) -> None:
        if share > 0 and not keyframes:
            raise ConfigError(
                f"no key frame was found in {len(data.ends)} episodes: nothing touches anything, the gripper never "
                "moves, or every event is too close to a success or to the end. Set keyframes.share to 0, or lower "
                "keyframes.margin_steps and keyframes.remaining_steps."
            )
        self.beginnings, self.share, self.seed, self.frontier_share = len(data.ends), share, seed, frontier_share
        self.keyframes = len(keyframes) if share > 0 else 0
        self.places = [(episode, 0) for episode in range(self.beginnings)]
        self.places += [(one.episode, one.step) for one in keyframes[: self.keyframes]]
        self.last = np.full(len(self.places), -1.0)
        self.drawn, self._fresh = np.zeros(2, np.int64), np.zeros(2, np.int64)

    def __call__(self, learner: Reinforcement) -> Starts:
        """Return the starts of the learner's current iteration."""
        config, iteration = learner.config, learner.iteration
        times = config.grpo.group_size if config.algorithm == "grpo" else 1
        groups = config.rollouts // times
        first, last = (math.floor(number * groups * self.share + _ROUNDING) for number in (iteration, iteration + 1))
        chosen, self._fresh = [], np.zeros(2, np.int64)
        kinds = ((_KEYFRAMES, self.beginnings, self.keyframes, last - first),
                 (_BEGINNINGS, 0, self.beginnings, groups - (last - first)))  # fmt: skip
        for kind, begin, count, wanted in kinds:
            again = self._frontier(begin, count, math.floor(self.frontier_share * wanted + _ROUNDING), iteration, kind)
            number = int(kind == _KEYFRAMES)
            position, self._fresh[number] = int(self.drawn[number]), wanted - len(again)
            chosen += [begin + one for one in self._draw(count, position, position + wanted - len(again), kind)] + again
        # The seed modulo the number of contexts is the context; the rest makes the noise of the model another one.
        rounds = iteration * groups + np.arange(groups)
        seeds = np.array(chosen) + len(self.places) * rounds
        return Starts.repeated([int(seed) for seed in seeds], times)

    def note(self, seeds: np.ndarray, success: np.ndarray) -> None:
        """Remember how the rollouts ``(R,)`` of an iteration ended; the next starts follow those of the last call."""
        self.drawn, self._fresh = self.drawn + self._fresh, np.zeros(2, np.int64)
        context = np.asarray(seeds) % len(self.places)
        for one in np.unique(context):
            self.last[one] = success[context == one].mean()

    def _frontier(self, begin: int, count: int, wanted: int, iteration: int, kind: int) -> list[int]:
        """At most ``wanted`` of ``count`` contexts from ``begin`` on whose last group both succeeded and failed."""
        last = self.last[begin : begin + count]
        mixed = begin + np.flatnonzero((last > 0) & (last < 1))
        rng = np.random.default_rng([self.seed, _FRONTIER, kind, iteration])
        return [int(one) for one in rng.permutation(mixed)[:wanted]]

    def is_keyframe(self, seeds: np.ndarray) -> np.ndarray:
        """Whether rollouts with these seeds began in a key frame."""
        return np.asarray(np.asarray(seeds) % len(self.places) >= self.beginnings)

    def _draw(self, count: int, first: int, last: int, kind: int) -> list[int]:
        """Elements ``first`` to ``last`` of an endless sequence of permutations of ``count`` contexts."""
        seed = int(np.random.SeedSequence([self.seed, kind]).generate_state(1)[0])
        return [int(batch_indices(count, 1, seed, position)[0]) for position in range(first, last)]


class ImaginedReinforcement(Reinforcement):
    """Reinforcement that remembers how rollouts ended, and reports those from first frames and key frames apart.

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
        self._starts.note(rollouts.seeds.numpy(), success)
        for name, rows in (("beginnings", ~keyframe), ("keyframes", keyframe)):
            metrics[f"rollouts_from_{name}"] = int(rows.sum())
            if rows.any():
                metrics[f"success_from_{name}"] = float(success[rows].mean())
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """See :meth:`Reinforcement.state_dict`."""
        starts = {
            "starts/last": torch.from_numpy(self._starts.last),
            "starts/drawn": torch.from_numpy(self._starts.drawn),
        }
        return super().state_dict() | {name: value.clone() for name, value in starts.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Reinforcement.load_state_dict`; what was learned of other starts is forgotten."""
        super().load_state_dict(state)
        if "starts/last" in state and len(state["starts/last"]) == len(self._starts.last):
            self._starts.last = state["starts/last"].numpy().copy()
            self._starts.drawn = state["starts/drawn"].numpy().copy()

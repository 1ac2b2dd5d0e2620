"""From which probability on imagined success counts: such that a policy succeeds no more often than it really did.

Held-out episodes calibrate the classifier under the actions that were really taken. A policy that acts in imagination
sees other pictures and does other things, and a model that is right under given actions may be far too kind to it.
Where it is too strict instead, its threshold stays: a lower one rewards what the classifier takes for a failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simtoreal.envs.rollout import Actor, Listener, Observation, Step, rollout
from simtoreal.world_models.checkpoint import LoadedWorldModel, save_world_model
from simtoreal.world_models.classifier import highest_threshold
from simtoreal.world_models.vector_env import WorldModelVectorEnv

# Above, probabilities are rounded.
MOST_THRESHOLD = 1 - 1e-6
# No probability reaches it, so that imagined episodes go on to their horizon.
NEVER = 2.0


class _Reached(Listener):
    """Keeps how likely success is in every step."""

    def __init__(self) -> None:
        self._episodes: dict[int, int] = {}
        self.probability: dict[int, list[float]] = {}

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        self._episodes[slot] = episode
        self.probability[episode] = []

    def on_step(self, step: Step) -> None:
        for slot, probability in zip(step.slots, step.info["success_probability"], strict=True):
            self.probability[self._episodes[int(slot)]].append(float(probability))


def calibrate_reward(env: WorldModelVectorEnv, actor: Actor, success: np.ndarray) -> tuple[dict[str, Any], int]:
    """Return the threshold at which a policy succeeds as often in imagination as it really did, and the steps it took.

    It is never below the classifier's own one.

    Args:
        env: seed s begins where real episode s of this policy began, for s from 0.
        actor: the policy, with the noise that it had in reality.
        success: ``(E,)`` bool: how these episodes really ended.

    Returns:
        ``threshold``, and ``before``, the model's own one; ``real``, ``imagined`` and ``imagined_before``: shares of
        success, really and in imagination with either threshold; ``episodes``.
    """
    before = env.threshold
    env.threshold = NEVER
    listener = _Reached()
    try:
        results = rollout(env, actor, range(len(success)), listeners=[listener])
    finally:
        env.threshold = before
    reached = np.array([highest_threshold(listener.probability[row], env.consecutive) for row in range(len(success))])
    threshold = matching_threshold(reached, int(success.sum()), before)
    found = {
        "threshold": threshold, "before": before, "episodes": len(success), "real": float(success.mean()),
        "imagined": float((reached >= threshold).mean()), "imagined_before": float((reached >= before).mean()),
    }  # fmt: skip
    return found, sum(result.steps for result in results)


def save_calibrated(loaded: LoadedWorldModel, found: Mapping[str, Any], run: Path) -> None:
    """Write a world model with another threshold as a run folder of its own.

    Args:
        loaded: the model; its threshold is changed.
        found: see :func:`calibrate_reward`; noted in the new ``training.json``.
        run: folder to write.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    model = loaded.model
    model.classifier.threshold.fill_(found["threshold"])
    training = {**loaded.training, "calibration": dict(found)}
    save_world_model(
        run, int(training["step"]), model, weights=dict(model.state_dict()), state={"empty": torch.zeros(0)},
        training=training,
    )  # fmt: skip


def matching_threshold(reached: np.ndarray, successes: int, least: float) -> float:
    """Return the threshold from ``least`` on that ``successes`` of the episodes reach, or as nearly as many as can be.

    Of two that miss by as much, the stricter one: a reward that is too kind is exploited.

    Args:
        reached: ``(E,)`` probability that every episode reaches.
        successes: from 0 to E.
        least: smallest threshold.
    """
    ordered = np.unique(reached)
    between = [ordered[:1] / 2, (ordered[:-1] + ordered[1:]) / 2, (ordered[-1:] + 1) / 2]
    candidates = np.clip(np.concatenate(between), least, MOST_THRESHOLD)
    beyond = (reached >= candidates[:, None]).sum(1) - successes
    nearest = np.flatnonzero(np.abs(beyond) == np.abs(beyond).min())
    strict = nearest[beyond[nearest] <= 0]
    return float(candidates[strict[0] if len(strict) else nearest[-1]])

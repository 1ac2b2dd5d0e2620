"""Where imagined episodes begin: real frames, at the start of an episode or in the middle of one (KIR).

Keyframe-initialised rollouts (KIR, WoVR arXiv 2602.13977, §3.2) begin shortly before contacts and failures, so that
little has to be imagined before it matters. Their context is what a model remembers: the first frame of the episode and
the last frames that led to the key frame, all real, with their actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from simtoreal.envs import rotation
from simtoreal.envs.action import action_towards
from simtoreal.envs.embodiment import TARGET_NAMES
from simtoreal.envs.errors import ConfigError
from simtoreal.world_models.state import PROPRIO_STEPS, Imagination
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel

# Contexts encoded at once.
BATCH = 64


class Contexts:
    """Contexts of a model, encoded once.

    Attributes:
        frames: ``(n,)`` index of the frame in which each begins.
        steps: ``(n,)`` control steps of the episode that lie before it.
        images: ``(n, V, H, W, 3)`` uint8, proprio: ``(n, P)`` float32: what is seen there.
        targets: ``(n, 10)`` float64 end-effector target before the first action; ``(n, 0)`` without one.
        instructions, names: of each episode.
        state: memory of all contexts.

    Args:
        model: what they are for.
        data: real episodes.
        places: ``(episode, step)`` of each context, both counted from 0. Default: the beginning of every episode.

    Raises:
        ConfigError: no place, one outside the data, or one before which there are fewer frames than the memory holds
            (the beginning of an episode, step 0, is allowed: its first frame is repeated).
        EmbodimentMismatchError: model and data are of different embodiments (robot, cameras, rate, render profile).
    """

    def __init__(self, model: WorldModel, data: VideoData, places: Sequence[tuple[int, int]] | None = None) -> None:
        model.embodiment.require_equal(data.embodiment, "the world model", "the data of the contexts")
        chosen = [(episode, 0) for episode in range(len(data.ends))] if places is None else list(places)
        if not chosen:
            raise ConfigError("no context to begin from; give at least one (episode, step)")
        for episode, step in chosen:
            self._check(data, episode, step, model.memory)
        episodes, self.steps = np.array(chosen, dtype=np.int64).T
        self._data, self._starts = data, data.starts[episodes]
        self.frames = self._starts + self.steps
        self.images, self.proprio = data.images[self.frames], data.proprio[self.frames]
        self.instructions = np.array([data.instructions[episode] for episode in episodes], dtype=object)
        self.names = tuple(f"{data.names[episode]}@{step}" for episode, step in chosen)
        self.targets = np.stack(
            [_target(data, frame, step) for frame, step in zip(self.frames, self.steps, strict=True)]
        )
        parts = np.array_split(np.arange(len(chosen)), -(-len(chosen) // BATCH))
        states = [_encode(model, data, self.frames[part], data.starts[episodes[part]]) for part in parts]
        self.state = Imagination.join(states)

    def __len__(self) -> int:
        return len(self.frames)

    def history(self, rows: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Images ``(n, steps, V, H, W, 3)`` and proprio ``(n, steps, P)`` up to the frames that contexts begin in."""
        frames = self.frames[rows][:, None] + np.arange(1 - steps, 1)
        frames = np.maximum(frames, self._starts[rows][:, None])
        return self._data.images[frames], self._data.proprio[frames]

    @staticmethod
    def _check(data: VideoData, episode: int, step: int, memory: int) -> None:
        if not 0 <= episode < len(data.ends):
            raise ConfigError(f"context ({episode}, {step}): the data hold episodes 0 to {len(data.ends) - 1}")
        length = int(data.ends[episode] - data.starts[episode])
        if not 0 <= step < length:
            raise ConfigError(f"context ({episode}, {step}): episode {data.names[episode]} has steps 0 to {length - 1}")
        if 0 < step < memory - 1:
            raise ConfigError(
                f"context ({episode}, {step}): {step + 1} frames lead there, and the memory of the world model holds "
                f"{memory}; begin at step 0, or from step {memory - 1} on"
            )


@torch.inference_mode()
def _encode(model: WorldModel, data: VideoData, frames: np.ndarray, starts: np.ndarray) -> Imagination:
    device = model.device
    wanted = frames[:, None] - np.arange(model.memory - 1, -1, -1)
    kept = np.maximum(wanted, starts[:, None])
    before = np.maximum(kept - 1, 0)
    commands = model.scale_commands(
        torch.from_numpy(data.actions[before]).to(device), torch.from_numpy(data.targets[before]).to(device)
    )
    # Nothing led to a first frame.
    commands = commands * torch.from_numpy(wanted > starts[:, None]).to(device)[..., None]
    recent = np.maximum(frames[:, None] - np.arange(PROPRIO_STEPS - 1, -1, -1), starts[:, None])
    return model.begin(
        torch.from_numpy(data.images[starts]).to(device), torch.from_numpy(data.images[kept]).to(device),
        torch.from_numpy(data.proprio[recent]).to(device), commands,
    )  # fmt: skip


def actions_at_rest(data: VideoData, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return actions ``(E, A)`` that leave things as they are in the first frames of ``episodes``, and their targets.

    Returns:
        Actions ``(E, A)`` float32, and the end-effector targets ``(E, 10)`` float32 that they repeat.

    Raises:
        ConfigError: actions of a foreign environment, whose meaning is not known.
    """
    if data.embodiment.action.mode == "env":
        raise ConfigError(f"which action of '{data.embodiment.name}' means no motion is not known (mode 'env')")
    targets = np.stack([_target(data, int(data.starts[episode]), 0) for episode in episodes])
    delta = data.embodiment.action.mode == "ee_delta"
    actions = action_towards(targets, targets, data.embodiment) if delta else targets
    return actions.astype(np.float32), targets.astype(np.float32)


def _target(data: VideoData, frame: int, step: int) -> np.ndarray:
    """End-effector target ``(10,)`` before the action of ``frame``; nothing if the embodiment has none."""
    if not data.targets.shape[1]:
        return np.zeros(0)
    if step > 0:
        pose = data.targets[frame - 1].astype(np.float64)
        return np.concatenate([pose[:3], rotation.to_6d(rotation.from_6d(pose[3:9])), pose[9:]])
    # An episode begins at rest: the target is where the arm is, as far as proprio does not say better.
    names, values = data.embodiment.proprio.names, data.proprio[frame].astype(np.float64)

    def entry(target: str) -> float:
        name = (
            target if target in names else target.replace("target_gripper", "gripper_opening").replace("target", "tcp")
        )
        if name not in names:
            raise ConfigError(f"proprio of '{data.embodiment.name}' has neither '{target}' nor '{name}'")
        return float(values[names.index(name)])

    pose = np.array([entry(name) for name in TARGET_NAMES])
    opening = np.round(np.clip(pose[9:], 0.0, 1.0))
    return np.concatenate([pose[:3], rotation.to_6d(rotation.from_6d(pose[3:9])), opening])

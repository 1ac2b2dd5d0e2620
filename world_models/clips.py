"""Videos to be judged: real episodes, and what the model imagines from their first frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from simtoreal.envs.action import integrate_action
from simtoreal.envs.errors import ConfigError
from simtoreal.policies.trainer import choose_precision
from simtoreal.world_models.contexts import Contexts
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel

# Episodes imagined together, and frames encoded or decoded together.
BATCH, FRAMES = 32, 256

Alteration = Literal["recorded", "still", "reversed", "swapped"]


@dataclass(frozen=True, kw_only=True)
class Clips:
    """M frames of E episodes, one after the other; the first frame of every episode is real in all of them.

    Attributes:
        episodes: ``(E,)`` index in the data.
        images: ``(M, V, H, W, 3)`` uint8.
        proprio: ``(M, P)`` float32, in physical units.
        actions: ``(M, A)`` float32 taken after every frame.
        success_probability: ``(M,)`` of the success classifier.
        starts, ends: ``(E,)`` range of every episode.
        frames: ``(M,)`` index in the data of the real frame of the same moment.
    """

    episodes: np.ndarray
    images: np.ndarray
    proprio: np.ndarray
    actions: np.ndarray
    success_probability: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    frames: np.ndarray

    @property
    def step(self) -> np.ndarray:
        """``(M,)`` control steps since the beginning of the episode, which is how far ahead a frame is imagined."""
        return np.arange(len(self.frames)) - np.repeat(self.starts, self.ends - self.starts)

    @property
    def episode(self) -> np.ndarray:
        """``(M,)`` row of the episode of every frame."""
        return np.repeat(np.arange(len(self.episodes)), self.ends - self.starts)

    def table(self, values: np.ndarray) -> np.ndarray:
        """Return ``(E, longest)`` of values ``(M,)`` per frame, NaN after the end of an episode."""
        table = np.full((len(self.episodes), int((self.ends - self.starts).max())), np.nan)
        table[self.episode, self.step] = values
        return table


def _layout(data: VideoData, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = (data.ends - data.starts)[episodes]
    ends = np.cumsum(lengths)
    frames = np.concatenate([np.arange(data.starts[e], data.ends[e]) for e in episodes])
    return ends - lengths, ends, frames


def real_clips(model: WorldModel, data: VideoData, episodes: np.ndarray) -> Clips:
    """Return what really happened in ``episodes`` (indices), with what the classifier of ``model`` says about it."""
    starts, ends, frames = _layout(data, episodes)
    probability = [
        _probability(model, data.images[part], data.proprio[part])
        for part in np.array_split(frames, -(-len(frames) // FRAMES))
    ]
    return Clips(
        episodes=episodes, images=data.images[frames], proprio=data.proprio[frames], actions=data.actions[frames],
        success_probability=np.concatenate(probability), starts=starts, ends=ends, frames=frames,
    )  # fmt: skip


@torch.inference_mode()
def _probability(model: WorldModel, images: np.ndarray, proprio: np.ndarray) -> np.ndarray:
    with _autocast(model):
        latents = model.encode(torch.from_numpy(images).to(model.device))
        vectors = model.scale_proprio(torch.from_numpy(proprio).to(model.device))
        return model.success_probability(latents, vectors).float().cpu().numpy()


@torch.inference_mode()
def reconstruct(model: WorldModel, images: np.ndarray) -> np.ndarray:
    """Return pictures ``(M, V, H, W, 3)`` as the tokenizer gives them back: what imagination cannot do better."""
    with _autocast(model):
        parts = [
            model.decode(model.encode(torch.from_numpy(images[part]).to(model.device))).cpu().numpy()
            for part in np.array_split(np.arange(len(images)), -(-len(images) // FRAMES))
        ]
    return np.concatenate(parts)


def _autocast(model: WorldModel) -> torch.autocast:
    enabled = choose_precision("auto", model.device) == "bf16"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


def altered_actions(data: VideoData, episodes: np.ndarray, alteration: Alteration) -> np.ndarray:
    """Return the actions ``(M, A)`` of all frames of ``episodes``, recorded or altered.

    ``still``: no motion, gripper as recorded; ``reversed``: every motion the other way round; ``swapped``: those of the
    next of the episodes (its last one repeated where it is shorter).

    Raises:
        ConfigError: nothing to swap with, or actions of a foreign environment, whose meaning is not known.
    """
    recorded = [data.actions[data.starts[e] : data.ends[e]] for e in episodes]
    if alteration == "recorded":
        return np.concatenate(recorded)
    if data.embodiment.action.mode != "ee_delta":
        raise ConfigError(
            f"actions of mode '{data.embodiment.action.mode}' cannot be altered; only displacements (ee_delta) can"
        )
    if alteration == "swapped":
        if len(episodes) < 2:
            raise ConfigError("swapped actions are those of another episode; give at least two")
        others = recorded[1:] + recorded[:1]
        return np.concatenate(
            [
                other[np.minimum(np.arange(len(own)), len(other) - 1)]
                for own, other in zip(recorded, others, strict=True)
            ]
        )
    factor = np.array(
        [1.0 if name == "gripper" else {"still": 0.0, "reversed": -1.0}[alteration]
         for name in data.embodiment.action.names], np.float32,
    )  # fmt: skip
    return np.concatenate(recorded) * factor


@torch.inference_mode()
def imagine_clips(
    model: WorldModel, data: VideoData, episodes: np.ndarray, actions: np.ndarray | None = None, *, seed: int = 0
) -> Clips:
    """Imagine episodes open loop: from their first frame, under given actions, to their last frame.

    What is imagined of an episode does not depend on the others, but for the rounding of batches of another size.

    Args:
        model: in evaluation mode.
        data: real episodes, of the model's embodiment.
        episodes: indices.
        actions: ``(M, A)`` for all frames of the episodes; default: the recorded ones.
        seed: of the noise of a ``flow`` model.

    Raises:
        EmbodimentMismatchError: model and data are of different embodiments.
    """
    starts, ends, frames = _layout(data, episodes)
    actions = data.actions[frames] if actions is None else actions.astype(np.float32)
    images = np.empty((len(frames), *data.images.shape[1:]), np.uint8)
    proprio, probability = np.empty((len(frames), data.proprio.shape[1]), np.float32), np.empty(len(frames), np.float32)
    images[starts], proprio[starts] = data.images[frames[starts]], data.proprio[frames[starts]]
    probability[starts] = _probability(model, images[starts], proprio[starts])
    lengths, chunk = ends - starts, model.config.dynamics.chunk
    order = np.argsort(lengths, kind="stable")
    for rows in np.array_split(order, -(-len(order) // BATCH)):
        steps = int(lengths[rows].max()) - 1
        if not steps:
            continue
        # Whole chunks: what comes from a pass depends on how many steps it is asked for, which must not follow from the
        # longest episode that happens to be imagined beside.
        steps = -(-steps // chunk) * chunk
        ahead = starts[rows, None] + np.minimum(np.arange(steps), lengths[rows, None] - 1)
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + int(episodes[row])) for row in rows]
        with _autocast(model):
            contexts = Contexts(model, data, [(int(episodes[row]), 0) for row in rows])
            commands = _commands(model, contexts.targets, actions[ahead])
            _, latents, vectors = model.imagine(contexts.state, commands, generators)
            for index, row in enumerate(rows):
                inside = slice(starts[row] + 1, ends[row])
                own, told = latents[index, : lengths[row] - 1], vectors[index, : lengths[row] - 1]
                images[inside] = np.concatenate([model.decode(part).cpu().numpy() for part in own.split(FRAMES)])
                probability[inside] = model.success_probability(own, told).float().cpu().numpy()
                proprio[inside] = model.unscale_proprio(told).float().cpu().numpy()
    return Clips(
        episodes=episodes, images=images, proprio=proprio, actions=actions, success_probability=probability,
        starts=starts, ends=ends, frames=frames,
    )  # fmt: skip


def _commands(model: WorldModel, targets: np.ndarray, actions: np.ndarray) -> torch.Tensor:
    """Scaled commands ``(E, T, C')`` of actions ``(E, T, A)`` that begin at end-effector targets ``(E, 10)``."""
    followed = np.zeros((*actions.shape[:2], targets.shape[1]))
    for step in range(actions.shape[1]):
        if targets.shape[1]:
            targets = integrate_action(targets, actions[:, step], model.embodiment)
        followed[:, step] = targets
    tensors = torch.from_numpy(actions).to(model.device), torch.from_numpy(followed.astype(np.float32)).to(model.device)
    return model.scale_commands(*tensors)

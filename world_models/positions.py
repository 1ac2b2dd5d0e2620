"""Where the end effector and the objects are: simulator truth, and a probe that reads it from pictures.

The probe is a small regression from one real frame of all cameras to positions. It never sees a generated frame, so it
says where things are in an imagined picture as it would in a real one; its error on real frames is the floor of what
can be measured. A policy's trainer trains it: to that, the positions are the action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from simtoreal.data_collection.dataset import EPISODES
from simtoreal.data_collection.episode import read_episode
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import parse_task
from simtoreal.policies.base import Generators, Policy
from simtoreal.policies.checkpoint import load_policy
from simtoreal.policies.config import AugmentationConfig, PolicyConfig, TrainerConfig, VisionConfig
from simtoreal.policies.encoders import ObservationEncoder
from simtoreal.policies.frame_windows import FrameWindows
from simtoreal.policies.inverse_dynamics import predict_windows
from simtoreal.policies.normalization import ACTIONS, Statistics, fit_statistics
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import TrainingData
from simtoreal.world_models.clips import Clips
from simtoreal.world_models.tokenizer import to_pixels
from simtoreal.world_models.video_data import VideoData

TCP = "tcp"
_AXES = ("x", "y", "z")


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Simulator truth of K things at N frames.

    Attributes:
        names: ``tcp``, then the objects of the task.
        values: ``(N, K, 3)`` float32 metres, robot base frame.
        task: of the objects; None without any.
        notes: what is missing and why.
    """

    names: tuple[str, ...]
    values: np.ndarray
    task: TaskSpec | None
    notes: tuple[str, ...] = ()


def tcp_columns(embodiment: Embodiment) -> list[int]:
    """Columns of proprio that hold the position of the end effector; none if it does not say."""
    names = [f"{TCP}_{axis}" for axis in _AXES]
    proprio = embodiment.proprio.names
    return [proprio.index(name) for name in names] if set(names) <= set(proprio) else []


def read_positions(data: VideoData) -> Positions:
    """Read the truth of every frame: the end effector from proprio, objects from ``object_state`` if it was recorded.

    Raises:
        DatasetError: an episode is damaged.
    """
    names, values, notes = [], [], []
    if columns := tcp_columns(data.embodiment):
        names.append(TCP)
        values.append(data.proprio[:, columns])
    else:
        notes.append("proprio holds no end-effector position: its error is not measured")
    task = parse_task(data.task, source=data.names[0]) if data.task.get("objects") else None
    states = _object_states(data) if task is not None else None
    if task is None:
        notes.append("the data hold several tasks, or one without objects: nothing is said about objects")
    elif states is None or states.shape[1] != len(task.object_state_names):
        notes.append(
            "the data hold no obs/object_state of the task (no simulator truth): nothing is said about objects"
        )
        task = None
    else:
        for item in task.objects:
            names.append(item.name)
            values.append(states[:, [task.object_state_names.index(f"{item.name}_{axis}") for axis in _AXES]])
    joined = np.stack(values, 1) if values else np.zeros((len(data), 0, 3))
    return Positions(names=tuple(names), values=joined.astype(np.float32), task=task, notes=tuple(notes))


def _object_states(data: VideoData) -> np.ndarray | None:
    found = []
    for name, start, end in zip(data.names, data.starts, data.ends, strict=True):
        folder, _, episode = name.rpartition("/")
        path = Path(folder) / EPISODES / f"{episode}.hdf5"
        try:
            state = read_episode(path, ["obs/object_state"])[1]["obs/object_state"]
        except DatasetError:
            return None
        if len(state) != end - start or (found and state.shape[1] != found[0].shape[1]):
            return None
        found.append(state)
    return np.concatenate(found)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(PolicyConfig):
    """Sizes of the probe. Its images are not shifted: that would move what it is asked for."""

    type: Literal["position_probe"] = "position_probe"
    """Kind of the model."""
    observation_steps: Literal[1] = 1
    """One frame."""
    horizon: Literal[1] = 1
    """One vector."""
    execute_steps: Literal[1] = 1
    """See ``horizon``."""
    state_keys: tuple[()] = ()
    """None: proprio would tell where the end effector is without looking."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Image encoder."""
    augmentation: AugmentationConfig = field(default_factory=lambda: AugmentationConfig(shift_px=0))
    """Colours only."""
    hidden: int = 256
    """Width of the perceptron."""


class PositionProbe(Policy):
    """Image encoders of all cameras, then a perceptron."""

    config_type = ProbeConfig
    config: ProbeConfig

    def __init__(self, config: ProbeConfig, embodiment: Embodiment, statistics: Mapping[str, Statistics]) -> None:
        super().__init__(config, embodiment, statistics)
        width = config.hidden
        self.encoder = ObservationEncoder(config, config.vision, config.augmentation, self.normalizer, width)
        self.head = nn.Sequential(
            nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.normalizer.dim(ACTIONS))
        )

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean absolute error of the scaled positions: a frame in which an object is hidden must not dominate."""
        wanted = self.normalizer.normalize(ACTIONS, batch["actions"][:, 0])
        return {"loss": (self.head(self.encoder(batch["observation"])).float() - wanted).abs().mean()}

    def predict(self, observation: dict[str, Tensor], instruction: Sequence[str], generator: Generators) -> Tensor:
        """Return positions ``(B, 1, 3 K)`` in metres."""
        return self.normalizer.denormalize(ACTIONS, self.head(self.encoder(observation)).float())[:, None]

    @torch.inference_mode()
    def feature_maps(self, images: Tensor, view: int) -> list[Tensor]:
        """Return the feature maps ``(N, C, h, w)`` after every stage for images ``(N, H, W, 3)`` of a camera."""
        hidden = to_pixels(images)
        maps = []
        for stage in self.encoder.images[0 if self.config.vision.shared else view].stages:
            hidden = stage(hidden)
            maps.append(hidden.float())
        return maps[1:]


def train_probe(
    data: VideoData,
    positions: Positions,
    episodes: np.ndarray,
    output: Path,
    *,
    steps: int,
    seed: int = 0,
    device: str | None = None,
    progress: bool = False,
) -> PositionProbe:
    """Train a probe on real frames, or load the one that was trained in ``output`` from the same data.

    Args:
        data, positions: frames and truth.
        episodes: ``(E,)`` bool: to learn from.
        output: run folder; an interrupted training is continued.
        steps: optimiser steps.
        seed, device, progress: as for :func:`simtoreal.policies.trainer.train`.

    Raises:
        ConfigError: ``output`` holds a probe of other data.
        DatasetError: there is nothing to tell the position of.
    """
    if not positions.names:
        raise DatasetError(f"no positions are known in the data: {'; '.join(positions.notes)}")
    frames = data.frames_of(episodes)
    vectors = positions.values.reshape(len(data), -1)
    images = {key: data.images[:, view] for view, key in enumerate(data.embodiment.image_keys)}
    owner = np.repeat(np.arange(len(data.ends)), data.ends - data.starts)
    windows = FrameWindows(images, frames[:, None], vectors[frames], owner[frames])
    training = TrainingData(
        embodiment=data.embodiment, task=data.task, train=windows, valid=None,
        statistics={ACTIONS: fit_statistics(windows.actions, None, "positions")}, source=data.names[0],
        seeds=data.seeds,
    )  # fmt: skip
    config = TrainerConfig(
        steps=steps, warmup_steps=min(50, steps), batch_size=32, learning_rate=2e-3, seed=seed, checkpoint_every=500
    )
    probe = ProbeConfig(image_keys=tuple(data.embodiment.image_keys))
    train(probe, config, training, output, kind=PositionProbe, resume=True, device=device, progress=progress)
    loaded = load_policy(output, device or ("cuda" if torch.cuda.is_available() else "cpu"), kind=PositionProbe).policy
    assert isinstance(loaded, PositionProbe)
    return loaded


def decode_positions(probe: PositionProbe, clips: Clips) -> np.ndarray:
    """Return what the probe sees in every frame, ``(M, K, 3)`` metres."""
    images = {key: clips.images[:, view] for view, key in enumerate(probe.config.image_keys)}
    frames = np.arange(len(clips.images))
    nothing = np.zeros((len(frames), 1), np.float32)
    found = predict_windows(probe, FrameWindows(images, frames[:, None], nothing, frames))
    return found.reshape(len(found), -1, 3)


def perceptual_distance(probe: PositionProbe, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a distance ``(M,)`` of pictures ``(M, V, H, W, 3)`` in the features of the probe's encoders.

    As LPIPS (Zhang et al. 2018, §3) without learned weights: feature vectors are scaled to length 1 at every place, and
    squared differences are averaged over places, stages and cameras. The encoders are ours, trained to see where things
    are, so the distance notices what matters for manipulation, and its values do not compare with published LPIPS.
    """
    found = []
    for part in np.array_split(np.arange(len(first)), max(1, -(-len(first) // 128))):
        distances = []
        for view in range(first.shape[1]):
            maps = [
                probe.feature_maps(torch.from_numpy(np.ascontiguousarray(images[part, view])).to(probe.device), view)
                for images in (first, second)
            ]
            distances += [
                (functional.normalize(a, dim=1) - functional.normalize(b, dim=1)).square().sum(1).mean((1, 2))
                for a, b in zip(*maps, strict=True)
            ]
        found.append(torch.stack(distances).mean(0).cpu().numpy())
    return np.concatenate(found)

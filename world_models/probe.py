"""Reads positions from pictures: tells whether the object in an imagined frame is where it should be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.policies.averaging import WeightAverage
from simtoreal.policies.config import TrainerConfig, VisionConfig
from simtoreal.policies.encoders import ImageEncoder
from simtoreal.policies.trainer import learning_rate, make_optimizer, seed_everything
from simtoreal.world_models.tokenizer import to_pixels
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel

VISION = VisionConfig(widths=(16, 32, 32), keypoints=16, features=64)
TRAINING = TrainerConfig(steps=600, batch_size=32, learning_rate=2e-3, warmup_steps=50)


def object_positions(data: VideoData, name: str) -> np.ndarray:
    """Return the true position ``(N, 3)`` in metres of an object in every frame, from ``obs/object_state``.

    Raises:
        ConfigError: the task has no such object.
        DatasetError: the data have no ``object_state`` (they are not simulated).
    """
    from simtoreal.envs.task_file import parse_task

    names = parse_task(data.task, source=data.names[0]).object_state_names
    if f"{name}_x" not in names:
        raise ConfigError(f"task '{data.task['name']}' has no object '{name}' whose position is known")
    column = names.index(f"{name}_x")
    result = np.empty((len(data), 3), np.float32)
    opened: dict[str, tuple[Dataset, dict[str, object]]] = {}
    for where, start, end in zip(data.names, data.starts, data.ends, strict=True):
        folder, _, number = where.rpartition("/")
        if folder not in opened:
            dataset = Dataset.open(folder)
            opened[folder] = dataset, {episode.name: episode for episode in dataset.episodes}
        dataset, episodes = opened[folder]
        arrays = dataset.read(episodes[number], ["obs/object_state"])  # type: ignore[arg-type]
        if "obs/object_state" not in arrays:
            raise DatasetError(f"{where}: has no 'obs/object_state'; only simulated data know where objects are")
        result[start:end] = arrays["obs/object_state"][:, column : column + 3]
    return result


class PositionProbe(nn.Module):
    """Images of all cameras to positions in metres.

    Args:
        views: number of cameras.
        mean, scale: ``(D,)`` of the positions.
    """

    def __init__(self, views: int, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([ImageEncoder(VISION) for _ in range(views)])
        self.head = nn.Sequential(nn.Linear(views * VISION.features, 128), nn.GELU(), nn.Linear(128, len(mean)))
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(N, D)`` metres for uint8 images ``(N, V, H, W, 3)``."""
        features = [encoder(to_pixels(images[:, view])) for view, encoder in enumerate(self.encoders)]
        return self.head(torch.cat(features, -1)) * self.scale + self.mean


@dataclass(frozen=True)
class TrainedProbe:
    """A probe and how far it is off itself.

    Attributes:
        probe: in evaluation mode.
        error: median distance per point on held-out real frames, metres.
    """

    probe: PositionProbe
    error: np.ndarray


def train_probe(
    data: VideoData, points: np.ndarray, model: WorldModel | None = None, config: TrainerConfig = TRAINING
) -> TrainedProbe:
    """Train a probe on the real frames of the training episodes.

    Args:
        data: frames.
        points: ``(N, P, 3)`` positions of P points in every frame, metres.
        model: if given, half of the frames are seen through its tokenizer, so that the blur of imagined frames is not
            mistaken for a displacement.
        config: how to train it.
    """
    wanted = torch.from_numpy(points.reshape(len(points), -1).astype(np.float32))
    frames, held_out = data.frames_of(~data.held_out), data.frames_of(data.held_out)
    seed_everything(config.seed, 0)
    probe = PositionProbe(data.images.shape[1], wanted[frames].mean(0), wanted[frames].std(0).clamp_min(1e-3))
    probe.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, average = make_optimizer(probe, config), WeightAverage(list(probe.parameters()))
    for step in range(config.steps):
        seed_everything(config.seed, step + 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        drawn = np.random.choice(frames, config.batch_size)
        images = torch.from_numpy(data.images[drawn])
        if model is not None:
            half = config.batch_size // 2
            with torch.no_grad():
                images[:half] = model.decode(model.encode(images[:half].to(model.device))).cpu()
        loss = ((probe(images) - wanted[drawn]) / probe.scale).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update()
    probe.eval().requires_grad_(False)
    with torch.no_grad():
        for parameter, averaged in zip(probe.parameters(), average.averages, strict=True):
            parameter.copy_(averaged)
    seen = held_out[:: max(1, len(held_out) // 512)]
    return TrainedProbe(probe, np.median(distances(probe, data.images[seen], points[seen]), axis=0))


@torch.inference_mode()
def distances(probe: PositionProbe, images: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return how far ``(N, P)`` metres the points that the probe sees lie from ``points`` ``(N, P, 3)``."""
    parts = np.array_split(np.arange(len(images)), max(1, len(images) // 128))
    seen = torch.cat([probe(torch.from_numpy(images[part])) for part in parts]).numpy()
    return np.linalg.norm(seen.reshape(points.shape) - points, axis=-1)

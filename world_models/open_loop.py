"""How long imagination stays true: whole held-out episodes, imagined from their first frame under the real actions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simtoreal.envs.errors import DatasetError
from simtoreal.world_models.probe import TrainedProbe, distances
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel

HORIZONS = (1, 5, 10, 20, 30)
# A position counts as right within this distance.
CLOSE_M = 0.02
TCP = ("tcp_x", "tcp_y", "tcp_z")


@dataclass(frozen=True)
class OpenLoop:
    """Imagined episodes beside the real ones.

    Attributes:
        episodes: ``(E,)`` indices in the data.
        images: per episode ``(T - 1, V, H, W, 3)`` uint8 imagined frames 1 … T - 1.
        proprio: per episode ``(T - 1, P)`` float32.
        success: per episode ``(T - 1,)`` probability that the frame shows success.
        frames_per_s: imagined and decoded pictures per second (every camera counts).
    """

    episodes: np.ndarray
    images: list[np.ndarray]
    proprio: list[np.ndarray]
    success: list[np.ndarray]
    frames_per_s: float


@torch.inference_mode()
def imagine_open_loop(model: WorldModel, data: VideoData, episodes: np.ndarray, seed: int = 0) -> OpenLoop:
    """Imagine ``episodes`` (indices) together, from the first frame to the last."""
    device, lengths = model.device, (data.ends - data.starts)[episodes]
    starts = data.starts[episodes]
    state = model.first_state(data.images[starts], data.proprio[starts])
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(episodes))]
    images, proprio, success = [], [], []
    begun = time.monotonic()
    for step in range(int(lengths.max()) - 1):
        now = np.minimum(starts + step, data.ends[episodes] - 1)
        command = model.scale_commands(
            torch.from_numpy(data.actions[now]).to(device), torch.from_numpy(data.targets[now]).to(device)
        )
        state, latents, vectors = model.imagine(state, command[:, None], generators)
        images.append(model.decode(latents[:, 0]).cpu().numpy())
        proprio.append(model.unscale_proprio(vectors[:, 0]).cpu().numpy())
        success.append(model.success_probability(latents[:, 0], vectors[:, 0]).float().cpu().numpy())
    seconds = time.monotonic() - begun

    def rows(values: list[np.ndarray]) -> list[np.ndarray]:
        stacked = np.stack(values, 1)
        return [stacked[row, : length - 1] for row, length in enumerate(lengths)]

    rate = len(images) * len(episodes) * model.views / seconds
    return OpenLoop(episodes, rows(images), rows(proprio), rows(success), rate)


def measure_open_loop(
    loop: OpenLoop,
    data: VideoData,
    points: np.ndarray,
    probe: TrainedProbe,
    names: Sequence[str],
    horizons: Sequence[int] = HORIZONS,
) -> dict[str, Any]:
    """Compare imagined with real episodes at several horizons, and at the end of every episode (``full``).

    Args:
        loop: imagined episodes.
        data: real ones.
        points: ``(N, P, 3)`` true positions of P points in metres.
        probe: reads the points from pictures.
        names: of the points.
        horizons: control steps; of an episode that ends before, nothing is counted.

    Returns:
        ``horizon -> {n, psnr_db, still_psnr_db, <name>_error_m (median), <name>_close (share within 2 cm),
        <name>_still_error_m, proprio_tcp_error_m}``. The ``still`` values are those of the first frame, repeated.

    Raises:
        DatasetError: no episode is longer than one step.
    """
    lengths = (data.ends - data.starts)[loop.episodes]
    if lengths.max() < 2:
        raise DatasetError("every episode ends after one step; there is nothing to imagine")
    tcp = [data.embodiment.proprio.names.index(name) for name in TCP if name in data.embodiment.proprio.names]
    result: dict[str, Any] = {}
    for horizon in (*horizons, None):
        rows = np.flatnonzero(lengths > (horizon or 1))
        if not len(rows):
            continue
        step = np.full(len(rows), horizon) if horizon else lengths[rows] - 1
        frames, first = data.starts[loop.episodes[rows]] + step, data.starts[loop.episodes[rows]]
        imagined = np.stack([loop.images[row][at - 1] for row, at in zip(rows, step, strict=True)])
        error, still = (distances(probe.probe, pictures, points[frames]) for pictures in (imagined, data.images[first]))
        found: dict[str, Any] = {
            "n": len(rows),
            "psnr_db": _psnr(imagined, data.images[frames]),
            "still_psnr_db": _psnr(data.images[first], data.images[frames]),
        }
        for index, name in enumerate(names):
            found[f"{name}_error_m"] = float(np.median(error[:, index]))
            found[f"{name}_close"] = float((error[:, index] < CLOSE_M).mean())
            found[f"{name}_still_error_m"] = float(np.median(still[:, index]))
        if len(tcp) == len(TCP):
            told = np.stack([loop.proprio[row][at - 1][tcp] for row, at in zip(rows, step, strict=True)])
            found["proprio_tcp_error_m"] = float(
                np.median(np.linalg.norm(told - data.proprio[frames][:, tcp], axis=-1))
            )
        result[str(horizon or "full")] = found
    return result


def _psnr(imagined: np.ndarray, real: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB."""
    error = ((imagined.astype(np.float32) - real) / 255.0) ** 2
    return float(np.mean(-10 * np.log10(np.maximum(error.mean((-3, -2, -1)), 1e-10))))


def strip(loop: OpenLoop, data: VideoData, row: int, steps: Sequence[int]) -> np.ndarray:
    """Real above imagined pictures of one episode, per camera: ``(2 V H, len(steps) W, 3)`` uint8."""
    start, length = data.starts[loop.episodes[row]], len(loop.images[row])
    chosen = [min(step, length) for step in steps]
    bands = []
    for view in range(data.images.shape[1]):
        bands.append(np.concatenate([data.images[start + step, view] for step in chosen], 1))
        bands.append(np.concatenate([loop.images[row][step - 1][view] for step in chosen], 1))
    return np.concatenate(bands)

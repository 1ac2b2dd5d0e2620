"""Do videos obey their actions? An inverse-dynamics model that saw only real ones reads the actions from them.

Never let the model that gave a reward be the judge (RLIR, arXiv 2509.23958): the judge has another seed and other
sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.evaluation.bootstrap import explained_variance
from simtoreal.policies.config import TrainerConfig, VisionConfig
from simtoreal.policies.frame_windows import FrameWindows
from simtoreal.policies.inverse_dynamics import (
    InverseDynamics,
    gap_steps,
    load_inverse_dynamics,
    mean_actions,
    pair_starts,
    predict_windows,
)
from simtoreal.policies.inverse_dynamics_config import InverseDynamicsConfig
from simtoreal.policies.inverse_dynamics_data import estimate_lag
from simtoreal.policies.normalization import ACTIONS, fit_statistics, has_known_units
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import TrainingData
from simtoreal.world_models.clips import Clips
from simtoreal.world_models.video_data import VideoData

# Apart from what anybody would choose for the model that gives the reward.
JUDGE_SEED = 7919
JUDGE_VISION = VisionConfig(widths=(24, 48, 96), output_stride=8, keypoints=24, features=96)
JUDGE_HIDDEN = 192
# Dimensions of which the judge reads less than this from real videos say nothing about imagined ones.
READABLE = 0.3
# Videos follow their actions if the judge reads at least this share of what it reads from real ones.
FOLLOWING = 0.5
# Mean gripper commands this close to 0 changed between the frames.
UNDECIDED = 0.5


def train_judge(
    data: VideoData,
    episodes: np.ndarray,
    output: Path,
    *,
    steps: int,
    seed: int = JUDGE_SEED,
    device: str | None = None,
    progress: bool = False,
) -> InverseDynamics:
    """Train a judge on real episodes, or load the one that was trained in ``output`` from the same data.

    Args:
        data: frames and actions.
        episodes: ``(E,)`` bool: to learn from.
        output: run folder; an interrupted training is continued.
        steps: optimiser steps.
        seed, device, progress: as for :func:`simtoreal.policies.trainer.train`.

    Raises:
        ConfigError: ``output`` holds a judge of other data.
        DatasetError: the episodes are too short for a pair of frames.
    """
    keys = tuple(data.embodiment.image_keys)
    config = InverseDynamicsConfig(image_keys=keys, vision=JUDGE_VISION, hidden=JUDGE_HIDDEN)
    gap, starts, ends = gap_steps(config, data.embodiment), data.starts[episodes], data.ends[episodes]
    lag = estimate_lag(data.actions, data.proprio, data.embodiment, starts, ends, gap)
    config = InverseDynamicsConfig(image_keys=keys, vision=JUDGE_VISION, hidden=JUDGE_HIDDEN, lag_steps=lag)
    first, episode = pair_starts(starts, ends, gap, lag)
    if not len(first):
        raise DatasetError(f"no episode is longer than {gap + lag} steps: too short to read actions from pictures")
    images = {key: data.images[:, view] for view, key in enumerate(keys)}
    pairs = FrameWindows(
        images, first[:, None] + np.array([0, gap]), mean_actions(data.actions, first, gap, lag), episode
    )
    known = has_known_units(data.embodiment, ACTIONS)
    training = TrainingData(
        embodiment=data.embodiment, task=data.task, train=pairs, valid=None,
        statistics={
            ACTIONS: fit_statistics(pairs.actions, data.embodiment.action.names, ACTIONS, known_units=known)
        },
        source=data.names[0], seeds=data.seeds,
    )  # fmt: skip
    schedule = TrainerConfig(steps=steps, warmup_steps=min(50, steps), batch_size=32, seed=seed, checkpoint_every=500)
    train(config, schedule, training, output, kind=InverseDynamics, resume=True, device=device, progress=progress)
    return load_inverse_dynamics(output, device or ("cuda" if torch.cuda.is_available() else "cpu"))[0]


def clip_pairs(model: InverseDynamics, clips: Clips) -> FrameWindows:
    """Return the pairs of frames of videos, with the mean action that they should show.

    Raises:
        DatasetError: no video is long enough.
    """
    first, episode = pair_starts(clips.starts, clips.ends, model.gap, model.lag)
    if not len(first):
        raise DatasetError(f"no video is longer than {model.gap + model.lag} steps: too short to read actions from")
    images = {key: clips.images[:, model.embodiment.image_keys.index(key)] for key in model.config.image_keys}
    wanted = mean_actions(clips.actions, first, model.gap, model.lag)
    return FrameWindows(images, first[:, None] + np.array([0, model.gap]), wanted, episode)


def read_actions(model: InverseDynamics, pairs: FrameWindows) -> dict[str, Any]:
    """Return how well actions can be read from pairs of frames.

    Returns:
        ``r2``: action name -> ``r2``, ``interval`` (bootstrap over episodes) and ``n``; ``gripper_accuracy``: share of
        pairs with an undivided gripper command whose sign is read (None without gripper); ``deviation``: root mean
        squared error per dimension (action units); ``pairs``.
    """
    predicted, wanted = predict_windows(model, pairs), pairs.actions
    scores = explained_variance(predicted, wanted, pairs.episode_of_window)
    accuracy = None
    if model.gripper is not None:
        decided = np.abs(wanted[:, model.gripper]) > UNDECIDED
        same = np.sign(predicted[decided, model.gripper]) == np.sign(wanted[decided, model.gripper])
        accuracy = float(same.mean()) if decided.any() else None
    return {
        "r2": dict(zip(model.embodiment.action.names, scores, strict=True)),
        "gripper_accuracy": accuracy,
        "deviation": [float(value) for value in np.sqrt(np.square(predicted - wanted).mean(0))],
        "pairs": len(pairs),
    }


def action_following(model: InverseDynamics, real: Clips, videos: dict[str, Clips]) -> dict[str, Any]:
    """Compare how well actions are read from videos and from real ones.

    Args:
        model: the judge.
        real: real videos, the ceiling.
        videos: name -> videos to judge.

    Returns:
        ``real`` and every name -> :func:`read_actions`, with ``following``: mean R^2 over what can be read from real
        videos, relative to those (1: as well as real ones), and ``follows``.

    Raises:
        ConfigError: the judge is of another embodiment than the videos.
    """
    found = {"real": read_actions(model, clip_pairs(model, real))}
    found |= {name: read_actions(model, clip_pairs(model, clips)) for name, clips in videos.items()}
    ceiling = {
        name: score["r2"] for name, score in found["real"]["r2"].items() if score["r2"] is not None
        and score["r2"] >= READABLE
    }  # fmt: skip
    for entry in found.values():
        entry["following"], entry["follows"] = None, None
        if ceiling:
            read = [entry["r2"][name]["r2"] for name in ceiling]
            shown = np.mean([max(-1.0, value) if value is not None else 0.0 for value in read])
            entry["following"] = float(shown / np.mean(list(ceiling.values())))
            entry["follows"] = entry["following"] >= FOLLOWING
    return {**found, "readable": list(ceiling), "gap_steps": model.gap, "lag_steps": model.lag}


def require_judge(model: InverseDynamics, data: VideoData, path: Path) -> None:
    """Refuse an inverse-dynamics model of another embodiment or render profile.

    Raises:
        EmbodimentMismatchError: it is of another one.
        ConfigError: it needs frames further apart than an episode is long.
    """
    model.embodiment.require_equal(data.embodiment, f"inverse-dynamics model {path}", "the data")
    if int((data.ends - data.starts).max()) <= model.gap + model.lag:
        raise ConfigError(f"{path} compares frames {model.gap} steps apart; no episode of the data is that long")

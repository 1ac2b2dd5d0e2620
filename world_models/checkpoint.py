"""World models on disk: folders as policies have, of safetensors and JSON, whole or not there at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simtoreal.envs.config import build_config, read_yaml
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import CheckpointError, ConfigError, EmbodimentMismatchError
from simtoreal.policies import checkpoint as folders
from simtoreal.world_models.config import WorldModelConfig
from simtoreal.world_models.world_model import WorldModel

FORMAT = "simtoreal-world-model"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LoadedWorldModel:
    """A world model ready to imagine.

    Attributes:
        model: in evaluation mode, on the requested device.
        embodiment: robot, cameras and actions that it was trained on.
        task: specification of the task of its data (empty if the data held several).
        training: content of ``training.json``.
        folder: the checkpoint folder that was read.
    """

    model: WorldModel
    embodiment: Embodiment
    task: dict[str, Any]
    training: dict[str, Any]
    folder: Path


def save_world_model(
    run: Path,
    step: int,
    model: WorldModel,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    training: dict[str, Any],
) -> Path:
    """Write ``run/checkpoints/<step>`` atomically; see :func:`simtoreal.policies.checkpoint.write_checkpoint`.

    Args:
        run: run folder.
        step: optimiser steps taken over all stages.
        model: gives config, embodiment and statistics.
        weights: to be used.
        state: what continues the training.
        training: written to ``training.json``.

    Raises:
        CheckpointError: the disk is full or not writable.
    """

    def write(folder: Path) -> None:
        folders.save_tensors(folder / folders.MODEL, weights)
        folders.save_tensors(folder / folders.STATE, state)
        described = {"format": FORMAT, "format_version": FORMAT_VERSION, **training}
        folders.save_description(folder, model.config, model.embodiment, model.normalizer.statistics, described)

    return folders.write_checkpoint(run, step, write)


def load_world_model(
    path: str | Path, device: str | torch.device = "cpu", *, unfinished: bool = False
) -> LoadedWorldModel:
    """Load a world model, knowing nothing but its path.

    Args:
        path: checkpoint folder, or run folder (then its newest checkpoint).
        device: where to put it.
        unfinished: accept a checkpoint from the middle of the training.

    Raises:
        CheckpointError: something is missing, damaged, of another kind or shape, or the training has not ended.
    """
    folder = folders.find_checkpoint(Path(path))
    training = folders.read_json(folder / folders.TRAINING)
    if training.get("format") != FORMAT or training.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is not a world model of version {FORMAT_VERSION} ({folders.TRAINING} says "
            f"'{training.get('format', 'no format')}'); give the --output folder of 'simtoreal world-model train'"
        )
    if not (unfinished or training.get("finished")):
        raise CheckpointError(
            f"{folder}: the training stopped in its stage '{training.get('stage')}'; finish it with "
            "'simtoreal world-model train --resume'"
        )
    try:
        config = build_config(WorldModelConfig, read_yaml(folder / folders.CONFIG), source=str(folder / folders.CONFIG))
        embodiment = Embodiment.from_dict(folders.read_json(folder / folders.EMBODIMENT))
        model = WorldModel(config, embodiment, folders.load_statistics(folder / folders.STATISTICS))
    except (ConfigError, EmbodimentMismatchError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be used: {error}") from error
    folders.load_weights(model, folders.load_tensors(folder / folders.MODEL), folder / folders.MODEL)
    model.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    return LoadedWorldModel(
        model=model, embodiment=embodiment, task=training.get("task") or {}, training=training, folder=folder
    )

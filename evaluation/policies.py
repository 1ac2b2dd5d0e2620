"""Checkpoints as something to evaluate."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from simtoreal.data_collection.dataset import META, Dataset
from simtoreal.envs.errors import ConfigError, SimtorealError
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.checkpoint import CONFIG, MODEL, LoadedPolicy, load_policy


def load_actor(
    path: Path,
    *,
    device: str = "auto",
    seed: int = 0,
    execute_steps: int | None = None,
    ensembling: float | None = None,
) -> tuple[LoadedPolicy, PolicyActor]:
    """Load a checkpoint (or the newest of a training run) as an actor.

    Args:
        path: folder of the run or checkpoint.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of the policy's own noise.
        execute_steps, ensembling: see :class:`PolicyActor`.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: a GPU was asked for and there is none, or a setting is out of range.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no usable GPU; use --device cpu")
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded = load_policy(path, chosen)
    return loaded, PolicyActor(loaded.policy, seed, execute_steps=execute_steps, ensembling=ensembling)


def checkpoint_digest(folder: Path) -> str:
    """Return a short digest of weights and configuration, to tell checkpoints apart."""
    digest = hashlib.sha256()
    for name in (MODEL, CONFIG):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def training_seeds(loaded: LoadedPolicy) -> set[int]:
    """Return the initial conditions of the policy's demonstrations, as far as they can be found out.

    They are stored in the checkpoint, or read from the dataset it names if that is still there.
    """
    data = loaded.training.get("data")
    data = data if isinstance(data, dict) else {}
    if isinstance(data.get("seeds"), list):
        return {int(seed) for seed in data["seeds"]}
    source = Path(str(data.get("source", "")))
    if not (source / META).is_file():
        return set()
    try:
        return {episode.seed for episode in Dataset.open(source).episodes}
    except SimtorealError:
        return set()  # Moved, changed or being rewritten: nothing is known about it any more.

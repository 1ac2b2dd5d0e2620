"""Trained scorers on disk: ``scorers/<digest>/`` in the folder of their base data, reused while nothing changed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simtoreal.data_collection.compatibility import Thresholds
from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs.config import build_config
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import CheckpointError, ConfigError, EmbodimentMismatchError
from simtoreal.envs.files import explained_disk_errors, fsync_folder, write_json
from simtoreal.policies.checkpoint import load_tensors, read_json, save_tensors
from simtoreal.policies.compatibility_config import ScorerConfig
from simtoreal.policies.compatibility_features import EncoderFeatures, Features, StateFeatures
from simtoreal.policies.compatibility_networks import ENSEMBLES
from simtoreal.policies.compatibility_scorer import Reference, Scorer, base_episodes, fit_scorer
from simtoreal.policies.normalization import Statistics

FORMAT, FORMAT_VERSION = "simtoreal-compatibility-scorer", 2
DESCRIPTION, TENSORS = "scorer.json", "scorer.safetensors"
CACHE = "scorers"


def open_scorer(
    base: Dataset, features: Features, config: ScorerConfig | None = None, *, device: str | torch.device = "cpu"
) -> Scorer:
    """Return the scorer of base data: the one stored beside them if it fits, else a new one, which is stored.

    Where the folder of the base data cannot be written to, the scorer is not stored.

    Raises:
        CheckpointError: the stored scorer is damaged, or the disk is full.
        DatasetError: see :func:`fit_scorer`.
    """
    config = config or ScorerConfig()
    files = [Path(str(episode.path)).stat() for episode in base_episodes(base)]
    identity = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "features": features.describe(),
        "embodiment": base.embodiment.to_dict(),
        "episodes": [[stat.st_size, stat.st_mtime_ns] for stat in files],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = base.path / CACHE / digest
    if (folder / DESCRIPTION).is_file():
        return load_scorer(folder, device=device, features=features)
    scorer = fit_scorer(base, features, config, device=device)
    try:
        save_scorer(scorer, folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return scorer


def save_scorer(scorer: Scorer, folder: Path) -> None:
    """Write a scorer to a new folder, whole or not at all.

    Raises:
        CheckpointError: the disk is full.
        PermissionError: the place cannot be written to.
    """
    tensors = {f"ensemble.{name}": value for name, value in scorer.ensemble.state_dict().items()}
    for name, statistics in (("state", scorer.state_statistics), ("action", scorer.action_statistics)):
        if statistics is not None:
            tensors[f"{name}.low"] = torch.from_numpy(statistics.low)
            tensors[f"{name}.high"] = torch.from_numpy(statistics.high)
    tensors["weights"] = torch.from_numpy(scorer.weights)
    tensors["references"] = torch.from_numpy(np.concatenate([reference.states for reference in scorer.references]))
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(scorer.config),
        "features": scorer.features.describe(),
        "embodiment": scorer.embodiment.to_dict(),
        "thresholds": {mode: dataclasses.asdict(value) for mode, value in scorer.thresholds.items()},
        "references": [
            {
                "name": ref.name,
                "operator": ref.operator,
                "mode": ref.mode,
                "digest": ref.digest,
                "steps": len(ref.states),
            }
            for ref in scorer.references
        ],
        "base": scorer.base,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        with explained_disk_errors(folder, CheckpointError, "Free space and run the same command again."):
            save_tensors(temporary / TENSORS, tensors)
            write_json(temporary / DESCRIPTION, description)
            fsync_folder(temporary)
            os.chmod(temporary, 0o755)
            # Another process may have stored the same scorer meanwhile; either is right.
            with contextlib.suppress(FileExistsError):
                if not folder.exists():
                    os.rename(temporary, folder)
            fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_scorer(folder: str | Path, *, device: str | torch.device = "cpu", features: Features | None = None) -> Scorer:
    """Read a stored scorer.

    Args:
        folder: ``scorers/<digest>``.
        device: where it runs.
        features: those it was made with, if they are at hand (an encoder takes seconds to load).

    Raises:
        CheckpointError: missing, damaged or of another version.
    """
    folder = Path(folder)
    content, tensors = read_json(folder / DESCRIPTION), load_tensors(folder / TENSORS)
    remedy = f"Delete {folder}; it is made anew when it is needed."
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{folder / DESCRIPTION}: is not a scorer of version {FORMAT_VERSION}. {remedy}")
    try:
        config: ScorerConfig = build_config(ScorerConfig, content["config"], source=str(folder / DESCRIPTION))
        described = content["features"]
        if features is None:
            encoder = described.get("encoder")
            if encoder is not None:
                features = EncoderFeatures(encoder, device)
            else:
                features = StateFeatures(*(described[name] for name in ("keys", "end_effector", "objects")))
        if features.describe() != described:
            raise CheckpointError(f"{folder}: was made for other features than these. {remedy}")
        statistics = {
            name: Statistics(low=tensors[f"{name}.low"].numpy(), high=tensors[f"{name}.high"].numpy())
            for name in ("state", "action")
            if f"{name}.low" in tensors
        }
        sizes = len(statistics["state"].low), int(tensors["ensemble.network.biases.2"].shape[-1])
        ensemble = ENSEMBLES[config.kind](config, config.members, *sizes)
        ensemble.load_state_dict(
            {name.removeprefix("ensemble."): value for name, value in tensors.items() if name.startswith("ensemble.")}
        )
        states, weights = tensors["references"].numpy(), tensors["weights"].numpy()
        references = _references(content["references"], states)
        thresholds = {mode: Thresholds(**value) for mode, value in content["thresholds"].items()}
        embodiment = Embodiment.from_dict(content["embodiment"])
        ensemble = ensemble.to(device).eval().requires_grad_(False)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        ConfigError,
        EmbodimentMismatchError,
    ) as error:
        raise CheckpointError(f"{folder}: cannot be used as a scorer ({error}). {remedy}") from error
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise CheckpointError(f"{folder / TENSORS}: holds values that are not finite. {remedy}")
    return Scorer(
        config=config, features=features, embodiment=embodiment, ensemble=ensemble,
        state_statistics=statistics["state"], action_statistics=statistics.get("action"),
        weights=weights, thresholds=thresholds, references=references,
        base=str(content.get("base", "")),
    )  # fmt: skip


def _references(described: list[dict[str, Any]], states: np.ndarray) -> tuple[Reference, ...]:
    ends = np.cumsum([int(entry["steps"]) for entry in described])
    if not len(ends) or ends[-1] != len(states):
        raise ValueError("the references do not add up to their states")
    return tuple(
        Reference(**{key: str(entry[key]) for key in ("name", "operator", "mode", "digest")}, states=part)
        for entry, part in zip(described, np.split(states, ends[:-1]), strict=True)
    )

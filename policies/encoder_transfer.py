"""Beginning a policy with the image encoders of another training: of an inverse-dynamics model, or of a policy."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simtoreal.envs.config import read_yaml
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import CheckpointError, ConfigError
from simtoreal.policies import checkpoint as checkpoints
from simtoreal.policies.base import Policy
from simtoreal.policies.encoders import ObservationEncoder

PREFIX = "encoder.images."
# What decides the weights of an encoder.
DECISIVE = ("widths", "blocks", "output_stride", "keypoints", "features", "shared")


def transfer_encoders(policy: Policy, source: str | Path) -> Path:
    """Copy the image encoders of a run into ``policy``, camera by camera, and return its checkpoint folder.

    Args:
        policy: to begin.
        source: run or checkpoint folder of an inverse-dynamics model or policy.

    Raises:
        CheckpointError: the source is missing or damaged, or has no image encoders.
        ConfigError: the policy has none, the encoders are of other sizes, or a camera is not among those of the source.
    """
    encoder = getattr(policy, "encoder", None)
    if not isinstance(encoder, ObservationEncoder) or not policy.config.image_keys:
        raise ConfigError(
            f"--encoder: a policy of type '{policy.config.type}' that reads {', '.join(policy.config.keys)} has no "
            "image encoder of ours to begin with"
        )
    folder = checkpoints.find_checkpoint(Path(source))
    content = read_yaml(folder / checkpoints.CONFIG)
    keys, vision = content.get("image_keys"), content.get("vision")
    if not keys or not isinstance(keys, list) or not isinstance(vision, dict):
        raise CheckpointError(
            f"{folder} holds no image encoders; --encoder takes a run of 'simtoreal world-model train-idm', or of "
            "'simtoreal train' with the policy type bc or diffusion"
        )
    wanted = checkpoints.plain_config(encoder.vision)
    differing = [
        f"{name} is {wanted[name]} here, {vision.get(name)} there"
        for name in DECISIVE
        if wanted[name] != vision.get(name)
    ]
    if differing:
        raise ConfigError(
            f"the image encoders of {folder} do not fit the policy: {'; '.join(differing)}. Give the policy the same, "
            f"e.g. --{policy.config.type}.vision.{differing[0].split()[0].replace('_', '-')}"
        )
    theirs = Embodiment.from_dict(checkpoints.read_json(folder / checkpoints.EMBODIMENT))
    _require_cameras(policy, theirs, keys, folder)
    tensors = checkpoints.load_tensors(folder / checkpoints.MODEL)
    for index, module in enumerate(encoder.images):
        place = 0 if encoder.vision.shared else keys.index(policy.config.image_keys[index])
        _copy(module, tensors, f"{PREFIX}{place}.", folder)
    return folder


def describe_encoders(source: str | Path) -> dict[str, Any]:
    """Return what identifies the image encoders of a run, for ``training.json``.

    Returns:
        ``encoder``: its checkpoint folder, absolute; ``encoder_digest``: of the encoders' weights; ``encoder_seeds``:
        initial conditions that they were trained on, as far as known, which are no longer unseen.

    Raises:
        CheckpointError: the source is missing or damaged.
    """
    folder = checkpoints.find_checkpoint(Path(source))
    digest = hashlib.sha256()
    for name, value in sorted(checkpoints.load_tensors(folder / checkpoints.MODEL).items()):
        if name.startswith(PREFIX):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    data = checkpoints.read_json(folder / checkpoints.TRAINING).get("data")
    seeds = data.get("seeds") if isinstance(data, dict) else None
    return {
        "encoder": os.path.abspath(folder), "encoder_digest": digest.hexdigest()[:16],
        "encoder_seeds": [int(seed) for seed in seeds or ()],
    }  # fmt: skip


def compare_encoders(training: dict[str, Any], source: str | Path | None) -> tuple[str | None, str | None]:
    """Return the encoders of a training to be continued and those asked for now, in words; equal if they are the same.

    Their weights decide, not how the path is spelled. A source that is gone is not needed any more: then its path has
    to do, as for checkpoints of earlier versions, which hold no digest.

    Args:
        training: content of the ``training.json`` of the checkpoint.
        source: run or checkpoint folder, or None.
    """
    folder, digest = training.get("encoder"), training.get("encoder_digest")
    stored = None if folder is None else f"{folder} (weights {digest})" if digest else str(folder)
    if source is None or folder is None:
        return stored, None if source is None else str(source)
    try:
        now = describe_encoders(source)
    except CheckpointError:
        places = (Path(folder).absolute(), Path(folder).absolute().parent.parent)
        return stored, stored if Path(os.path.abspath(source)) in places else f"{source} (holds no checkpoint)"
    same = now["encoder_digest"] == digest if digest else Path(now["encoder"]).resolve() == Path(folder).resolve()
    return stored, stored if same else f"{now['encoder']} (weights {now['encoder_digest']})"


def _require_cameras(policy: Policy, theirs: Embodiment, keys: list[str], folder: Path) -> None:
    """Every camera of the policy must be one of the source's, with images of the same size."""
    sizes = [
        {f"{camera.name}_image": (camera.height, camera.width) for camera in embodiment.cameras}
        for embodiment in (policy.embodiment, theirs)
    ]
    for key in policy.config.image_keys:
        if key not in keys:
            raise ConfigError(
                f"the policy reads '{key}', but {folder} learned to see {', '.join(keys)}; train it with that camera, "
                "or leave the camera out of the policy's image_keys"
            )
        if sizes[0][key] != sizes[1].get(key):
            raise ConfigError(
                f"'{key}' has {sizes[0][key]} pixels here and {sizes[1].get(key)} in {folder}; use data of one size"
            )


@torch.no_grad()
def _copy(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str, folder: Path) -> None:
    part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not part:
        raise CheckpointError(f"{folder} has no weights '{prefix}...'; it holds no image encoders of ours")
    checkpoints.load_weights(module, part, folder / checkpoints.MODEL)

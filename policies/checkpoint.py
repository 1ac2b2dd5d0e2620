"""Checkpoint folders: written whole or not at all, loadable from their path alone, never pickled.

``model.safetensors`` (averaged weights), ``config.yaml``, ``embodiment.json``, ``stats.safetensors``, ``training.json``
and, to continue training, ``state.safetensors``. A run folder has them in ``checkpoints/<step>``, and a link ``last``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from simtoreal.envs.config import build_config, read_yaml
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import CheckpointError, ConfigError, EmbodimentMismatchError
from simtoreal.envs.files import fsync_folder, write_json
from simtoreal.policies.base import Policy
from simtoreal.policies.config import PolicyConfig
from simtoreal.policies.normalization import Statistics
from simtoreal.policies.registry import policy_class

MODEL, CONFIG, EMBODIMENT, STATISTICS, TRAINING, STATE = (
    "model.safetensors", "config.yaml", "embodiment.json", "stats.safetensors", "training.json", "state.safetensors",
)  # fmt: skip
CHECKPOINTS, LAST = "checkpoints", "last"
KEPT = 2

C = TypeVar("C", bound=PolicyConfig)


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy ready to act.

    Attributes:
        policy: in evaluation mode, on the requested device.
        embodiment: robot, cameras and actions that it was trained for.
        task: specification of the task of its data (empty if the data held several).
        config: settings of the policy.
        training: content of ``training.json``.
        folder: the checkpoint folder that was read.
    """

    policy: Policy
    embodiment: Embodiment
    task: dict[str, Any]
    config: PolicyConfig
    training: dict[str, Any]
    folder: Path


def plain_config(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain values for yaml and JSON (tuples become lists)."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return content


def cpu_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies in main memory, as safetensors needs them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_policy(
    folder: Path, policy: Policy, *, weights: Mapping[str, Tensor] | None = None, training: dict[str, Any]
) -> None:
    """Write what :func:`load_policy` needs into an existing folder, and make it durable.

    Args:
        folder: existing, empty.
        policy: gives config, embodiment and statistics.
        weights: its state dictionary, by default the current one.
        training: written to ``training.json``; ``task`` in it is the task specification.

    Raises:
        OSError, safetensors.SafetensorError: the disk is full or not writable.
    """
    save_tensors(folder / MODEL, policy.state_dict() if weights is None else weights)
    save_description(folder, policy.config, policy.embodiment, policy.normalizer.statistics, training)


def save_description(
    folder: Path, config: Any, embodiment: Embodiment, statistics: Mapping[str, Statistics], training: dict[str, Any]
) -> None:
    """Write everything of a checkpoint but its weights: what the model is, and what it was made for and from."""
    bounds = {}
    for key, value in statistics.items():
        bounds[f"{key}.low"], bounds[f"{key}.high"] = torch.from_numpy(value.low), torch.from_numpy(value.high)
    save_tensors(folder / STATISTICS, bounds)
    with open(folder / CONFIG, "w", encoding="utf-8") as handle:
        yaml.safe_dump(plain_config(config), handle, sort_keys=False)
        handle.flush()
        os.fsync(handle.fileno())
    write_json(folder / EMBODIMENT, embodiment.to_dict())
    write_json(folder / TRAINING, training)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file and make it durable."""
    safetensors.torch.save_file(cpu_tensors(tensors), path)
    os.chmod(path, 0o644)
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def save_checkpoint(
    run: Path,
    step: int,
    policy: Policy,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    training: dict[str, Any],
) -> Path:
    """Write a checkpoint of a policy; see :func:`write_checkpoint`.

    Args:
        run: run folder.
        step: optimiser steps taken.
        policy: see :func:`save_policy`.
        weights: averaged weights, to be deployed.
        state: tensors that continue the training.
        training: see :func:`save_policy`.

    Raises:
        CheckpointError: the disk is full or not writable.
    """

    def write(folder: Path) -> None:
        save_policy(folder, policy, weights=weights, training=training)
        save_tensors(folder / STATE, state)

    return write_checkpoint(run, step, write)


def write_checkpoint(run: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill ``run/checkpoints/<step>``, point ``last`` at it, and remove all but the newest two.

    A crash at any moment, or a full disk, leaves the previous checkpoint and its link as they were.

    Args:
        run: run folder.
        step: optimiser steps taken.
        write: fills an existing, empty folder with durable files.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    parent = run / CHECKPOINTS
    final = parent / f"{step:06d}"
    temporary: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=parent))
        write(temporary)
        fsync_folder(temporary)
        os.chmod(temporary, 0o755)
        if final.exists():
            # Left by a run that was killed between this rename and the link; it holds the same step.
            shutil.rmtree(final)
        os.replace(temporary, final)
        fsync_folder(parent)
        _link_last(parent, final.name)
    except (OSError, safetensors.SafetensorError) as error:
        previous = parent / LAST
        kept = f"{previous} is intact" if previous.exists() else "there is no earlier checkpoint"
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}. {kept}. Free disk space, then continue with --resume."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in complete_checkpoints(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _link_last(parent: Path, name: str) -> None:
    link = parent / f".{LAST}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, parent / LAST)
    fsync_folder(parent)


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first; folders of other names, such as copies, are not ours."""
    found = (path for path in (run / CHECKPOINTS).glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def checkpoints_to_continue(run: Path, resume: bool) -> list[Path]:
    """Return the checkpoints that a training in ``run`` continues from, oldest first; none if it begins.

    Raises:
        ConfigError: there are some, and they are not to be continued.
    """
    found = complete_checkpoints(run)
    if found and not resume:
        raise ConfigError(f"{run} already holds a training; add --resume to continue it, or choose another folder")
    return found


def clear_leftovers(run: Path) -> None:
    """Finish what a run was killed in while it wrote a checkpoint: remove temporary folders, link the newest one."""
    parent = run / CHECKPOINTS
    for path in parent.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    newest = complete_checkpoints(run)[-1:]
    if newest and not _linked(parent, newest[0]):
        # On a disk that is full or not writable the newest one is found without its link.
        with contextlib.suppress(OSError):
            _link_last(parent, newest[0].name)


def _linked(parent: Path, checkpoint: Path) -> bool:
    return (parent / LAST).resolve() == checkpoint.resolve()


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder meant by a checkpoint folder or a run folder (its newest, which is its ``last``).

    Raises:
        CheckpointError: there is none.
    """
    # A run killed before it could set the link has a newer checkpoint than its link says.
    unlinked = [one for one in complete_checkpoints(path)[-1:] if not _linked(path / CHECKPOINTS, one)]
    for folder in (path, *unlinked, path / CHECKPOINTS / LAST):
        if (folder / MODEL).is_file():
            return folder
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; expected the --output folder of a training or one of its checkpoints"
        )
    raise CheckpointError(
        f"{path} holds no checkpoint: neither {MODEL} nor {CHECKPOINTS}/{LAST}/{MODEL} is there. "
        "Give the --output folder of 'simtoreal train' after its first checkpoint."
    )


def load_policy(
    path: str | Path, device: str | torch.device = "cpu", *, kind: type[Policy] | None = None
) -> LoadedPolicy:
    """Load a policy, knowing nothing but its path.

    Args:
        path: checkpoint folder, or run folder (then its newest checkpoint).
        device: where to put it.
        kind: class to load it as, for what is trained as policies are but cannot act, and so has no registered type.

    Raises:
        CheckpointError: something is missing, damaged, foreign or of another shape.
        ConfigError: the policy type is unknown here.
    """
    folder = find_checkpoint(Path(path))
    try:
        content = read_yaml(folder / CONFIG)
        name = content.get("type")
        if not isinstance(name, str):
            raise CheckpointError(f"{folder / CONFIG}: key 'type' is missing; it names the kind of policy")
        policy_type = policy_class(name) if kind is None else kind
        if kind is not None and name != (wanted := _type_name(kind)):
            raise CheckpointError(
                f"{folder} holds a '{name}', and a '{wanted}' is needed here; give the run of another"
            )
        config = stored_config(policy_type.config_type, content, folder)
        embodiment = Embodiment.from_dict(read_json(folder / EMBODIMENT))
        training = read_json(folder / TRAINING)
        policy = policy_type(config, embodiment, load_statistics(folder / STATISTICS))
    except (ConfigError, EmbodimentMismatchError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be used: {error}") from error
    load_weights(policy, load_tensors(folder / MODEL), folder / MODEL)
    policy.to(device).eval().requires_grad_(False)
    return LoadedPolicy(
        policy=policy, embodiment=embodiment, task=training.get("task") or {}, config=config, training=training,
        folder=folder,
    )  # fmt: skip


def stored_config(kind: type[C], content: dict[str, Any], folder: Path) -> C:
    """Return the settings of a checkpoint; those that are newer than it are what they were before they had a name.

    Args:
        kind: which settings.
        content: of its ``config.yaml``.
        folder: of the checkpoint, for messages.

    Raises:
        ConfigError: a value does not fit.
    """
    return build_config(kind, {**kind.OLDER, **content}, source=str(folder / CONFIG))


def _type_name(kind: type[Policy]) -> str:
    return next(str(field.default) for field in dataclasses.fields(kind.config_type) if field.name == "type")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON mapping.

    Raises:
        CheckpointError: missing, damaged, or not a mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}. It is missing or damaged; use another checkpoint."
        ) from error
    return tensors


def load_statistics(path: Path) -> dict[str, Statistics]:
    """Return the normalisation bounds of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    tensors = load_tensors(path)
    keys = {name.rpartition(".")[0] for name in tensors}
    try:
        return {
            key: Statistics(low=tensors[f"{key}.low"].float().numpy(), high=tensors[f"{key}.high"].float().numpy())
            for key in sorted(keys)
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; expected '<key>.low' and '<key>.high' for every key") from error


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy ``tensors`` into ``model``, which must have exactly these names and shapes.

    Raises:
        CheckpointError: lists missing, foreign and misshaped tensors, or says which is not finite.
    """
    own = model.state_dict()
    problems = [f"missing: {name} {tuple(own[name].shape)}" for name in own if name not in tensors]
    problems += [f"foreign: {name} {tuple(tensors[name].shape)}" for name in tensors if name not in own]
    problems += [
        f"shape: {name} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        listed = "\n  ".join(problems[:20] + (["..."] if len(problems) > 20 else []))
        raise CheckpointError(
            f"{source} does not fit the model of its {CONFIG} ({len(problems)} tensors differ):\n  {listed}\n"
            "Model, configuration and statistics must come from the same training."
        )
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{source}: tensor {name} is not finite; the training diverged or the file is damaged"
            )
    model.load_state_dict(dict(tensors))

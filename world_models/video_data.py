"""Episodes as videos of all cameras with proprio and actions, held in memory end to end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.compatibility import STATIC, collection_mode
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo
from simtoreal.envs.embodiment import TARGET_NAMES, Embodiment
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.task import SUCCESS_HOLD_STEPS
from simtoreal.policies.available_memory import available_memory
from simtoreal.world_models.config import STRIDE

# An episode ends once the goal held for SUCCESS_HOLD_STEPS steps, and what follows its last action is not stored.
POSITIVE_FRAMES = SUCCESS_HOLD_STEPS - 1
# Where a seed says how an episode began. On a robot, and in imported data, it only numbers the episodes of a folder.
SEEDED_SOURCES = ("expert", "teleop", "policy", "twin")
UNKNOWN_SEED = -1
# Of every ten episodes of a folder with the same outcome, one is held out.
HELD_OUT_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class VideoData:
    """N frames of E episodes, one after the other.

    Attributes:
        embodiment: of every episode.
        task: specification of the task (empty if there are several).
        images: ``(N, V, H, W, 3)`` uint8, cameras in the embodiment's order.
        proprio: ``(N, P)`` float32, before the action.
        actions: ``(N, A)`` float32.
        targets: ``(N, 10)`` float32 end-effector target *after* the action (``TARGET_NAMES``), which is arithmetic and
            need not be learned; ``(N, 0)`` if the embodiment has none.
        labels: ``(N,)`` bool: the goal holds in this frame.
        starts, ends: ``(E,)`` range of frames of every episode.
        success: ``(E,)`` bool.
        held_out: ``(E,)`` bool: episodes to validate with.
        names: ``(E,)`` folder and number of every episode.
        instructions: ``(E,)`` texts.
        seeds: ``(E,)`` initial conditions, :data:`UNKNOWN_SEED` where these have no number.
        notes: what was left out and why, one line each.
    """

    embodiment: Embodiment
    task: dict[str, Any]
    images: np.ndarray
    proprio: np.ndarray
    actions: np.ndarray
    targets: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    success: np.ndarray
    held_out: np.ndarray
    names: tuple[str, ...]
    instructions: tuple[str, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def first_frame(self) -> np.ndarray:
        """``(N,)`` index of the first frame of every frame's episode."""
        return np.repeat(self.starts, self.ends - self.starts)

    def frames_of(self, episodes: np.ndarray) -> np.ndarray:
        """Indices of all frames of the episodes where ``episodes`` ``(E,)`` is true."""
        return np.flatnonzero(np.repeat(episodes, self.ends - self.starts))

    def fingerprint(self) -> str:
        """Digest that changes when the data change."""
        digest = hashlib.sha256(repr(sorted(self.embodiment.to_dict().items())).encode())
        for array in (self.proprio, self.actions, self.targets, self.labels, self.ends, self.held_out):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]


def open_video_data(
    paths: Sequence[str | Path], *, embodiment: Embodiment | None = None, moving: bool = False
) -> VideoData:
    """Read datasets into memory; failures are as welcome as successes.

    Args:
        paths: dataset folders of the same embodiment.
        embodiment: required of the data, if given.
        moving: also take episodes whose scene moved by itself (MOVE); a model of them learns that objects do.

    Raises:
        ConfigError: no folder, or images that the tokenizer cannot take.
        DatasetError: a folder is damaged, lacks images, or has nothing to learn from.
        EmbodimentMismatchError: the folders are of different embodiments (robot, cameras, rate, render profile).
    """
    if not paths:
        raise ConfigError("give at least one dataset folder to learn a world model from")
    datasets = [Dataset.open(path, embodiment=embodiment) for path in paths]
    own = datasets[0].embodiment
    for dataset in datasets[1:]:
        dataset.embodiment.require_equal(own, f"dataset {dataset.path}", f"dataset {datasets[0].path}")
    require_images(own, datasets[0].path)
    chosen: list[tuple[Dataset, EpisodeInfo]] = []
    held_out: list[bool] = []
    notes = []
    for dataset in datasets:
        episodes = [one for one in dataset.episodes if moving or collection_mode(one.extra) == STATIC]
        if moved := len(dataset.episodes) - len(episodes):
            notes.append(f"{moved} episodes of {dataset.path} are left out: their scene moved by itself (MOVE)")
        chosen += [(dataset, episode) for episode in episodes]
        held_out += _held_out([episode.success for episode in episodes])
    if len(chosen) < 2:
        raise DatasetError(
            f"{', '.join(map(str, paths))}: {len(chosen)} usable episodes; a world model needs at least two, one of "
            f"them to validate with. {' '.join(notes)}"
        )
    if not any(held_out):
        held_out[-1] = True
    return _join(own, chosen, np.array(held_out), tuple(notes))


def _held_out(success: Sequence[bool]) -> list[bool]:
    """Every tenth success and every tenth failure, or the second where there are two to nine.

    Both outcomes are needed to calibrate with. Counted apart, and from the front, what was learned from is not held out
    when the folder has grown.
    """
    outcomes = np.array(success, bool)
    chosen = np.zeros(len(outcomes), bool)
    for outcome in (True, False):
        same = np.flatnonzero(outcomes == outcome)
        chosen[same[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] if len(same) >= HELD_OUT_EVERY else same[1:2]] = True
    return chosen.tolist()


def require_images(embodiment: Embodiment, source: Path | str) -> None:
    """Refuse cameras that the tokenizer cannot take; ``source`` says whose they are.

    Raises:
        ConfigError: there are none, or they differ in size, or it is no multiple of 8 pixels.
    """
    sizes = {(camera.height, camera.width) for camera in embodiment.cameras}
    if len(sizes) != 1 or any(side % STRIDE for size in sizes for side in size):
        found = ", ".join(f"{camera.name} {camera.height}x{camera.width}" for camera in embodiment.cameras) or "none"
        raise ConfigError(
            f"{source}: cameras are {found}; a world model needs one or more, all of one size that is a multiple of "
            f"{STRIDE} pixels"
        )


def _join(
    embodiment: Embodiment, chosen: list[tuple[Dataset, EpisodeInfo]], held_out: np.ndarray, notes: tuple[str, ...]
) -> VideoData:
    lengths = np.array([episode.steps for _, episode in chosen])
    ends = np.cumsum(lengths)
    starts, total = ends - lengths, int(ends[-1])
    camera = embodiment.cameras[0]
    has_target = embodiment.action.mode != "env"
    shape = (total, len(embodiment.cameras), camera.height, camera.width, 3)
    # The system would grant more than there is, and kill the process when it is used.
    if math.prod(shape) > available_memory():
        raise DatasetError(
            f"the images of {total} frames need {math.prod(shape) / 2**30:.1f} GiB of memory, and "
            f"{available_memory() / 2**30:.1f} GiB are free; take fewer episodes, or record smaller images"
        )
    images = np.empty(shape, np.uint8)
    proprio = np.empty((total, embodiment.proprio.dim), np.float32)
    actions = np.empty((total, embodiment.action.dim), np.float32)
    targets = np.empty((total, len(TARGET_NAMES) if has_target else 0), np.float32)
    labels = np.zeros(total, bool)
    names = [f"obs/{key}" for key in embodiment.image_keys]
    wanted = [*names, "obs/proprio", "actions", *(["step/target"] if has_target else [])]
    for (dataset, episode), start, end in zip(chosen, starts, ends, strict=True):
        arrays = dataset.read(episode, wanted)
        for view, name in enumerate(names):
            images[start:end, view] = arrays[name]
        proprio[start:end], actions[start:end] = arrays["obs/proprio"], arrays["actions"]
        if has_target:
            targets[start:end] = arrays["step/target"]
        if episode.success:
            labels[max(start, end - POSITIVE_FRAMES) : end] = True
    tasks = {name: task for dataset, _ in chosen for name, task in dataset.tasks.items()}
    return VideoData(
        embodiment=embodiment,
        task=next(iter(tasks.values())) if len(tasks) == 1 else {},
        images=images,
        proprio=proprio,
        actions=actions,
        targets=targets,
        labels=labels,
        starts=starts,
        ends=ends,
        success=np.array([episode.success for _, episode in chosen]),
        held_out=held_out,
        names=tuple(f"{dataset.path}/{episode.name}" for dataset, episode in chosen),
        instructions=tuple(episode.instruction for _, episode in chosen),
        seeds=tuple(one.seed if one.source in SEEDED_SOURCES else UNKNOWN_SEED for _, one in chosen),
        notes=notes,
    )

"""What every import of another program's dataset has in common: names, bounds, and writing episodes.

A reader of a format yields episodes in our layout; :func:`import_dataset` stores them. Files from elsewhere are not
trusted: sizes are checked against :data:`LARGEST_EPISODE_BYTES` before anything is allocated, paths never leave the
dataset, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from simtoreal.data_collection.dataset import META, Dataset, read_meta, step_shapes
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, disk_errors
from simtoreal.data_collection.foreign_embodiment import IMAGE_SUFFIX
from simtoreal.data_collection.writer import new_dataset
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.files import write_json

# An episode is held in memory as a whole: ten minutes of four 480 x 640 cameras at 10 Hz are 22 GB, one of which fits.
LARGEST_EPISODE_BYTES = 16 * 2**30
LARGEST_JSON_BYTES = 64 * 2**20
MOST_EPISODES = 1_000_000
_ARRAY_NAME = re.compile(r"actions|rewards|dones|states|(obs|step)/[A-Za-z0-9_.:-]+")
Progress = Callable[[int, int], None]
"""Called with the episodes done and their total."""


class Reader(Protocol):
    """A dataset of another program, opened for reading.

    Attributes:
        embodiment: of every episode.
        tasks: task name -> specification.
        episodes: name of every episode in the source, in its order.
        masks: name -> episode names of the source.
        notes: what the user should know about the conversion, one line each; grows while reading.
    """

    embodiment: Embodiment
    tasks: Mapping[str, Mapping[str, Any]]
    episodes: Sequence[str]
    masks: Mapping[str, Sequence[str]]
    notes: list[str]

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def read(self, episode: str) -> tuple[Arrays, EpisodeInfo]:
        """Arrays and description of one episode.

        Raises:
            DatasetError: it is damaged or unsafe.
        """


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """Outcome of an import.

    Attributes:
        episodes, successes, steps: what the dataset holds.
        skipped: one line per episode that could not be used.
        damaged: one line per part of the source that could not be read.
        notes: what was assumed, renamed or left out.
    """

    episodes: int
    successes: int
    steps: int
    skipped: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def import_dataset(reader: Reader, output: Path, *, progress: Progress | None = None) -> ImportResult:
    """Store every episode of ``reader`` in the new dataset folder ``output``.

    Raises:
        DatasetError: ``output`` holds something already, the disk is full, or not one episode could be used; nothing
            is left behind.
    """
    refuse_existing(output)
    skipped: list[str] = []
    stored: dict[str, str] = {}
    steps = successes = 0
    with new_dataset(output, reader.embodiment, reader.tasks) as writer:
        for done, name in enumerate(reader.episodes):
            try:
                arrays, info = reader.read(name)
                _check_layout(arrays, reader.embodiment, f"episode {name}")
            except DatasetError as error:
                skipped.append(f"episode {name}: {error}")
            else:
                try:
                    stored[name] = writer.add(arrays, info).stem
                    steps += len(arrays["actions"])
                    successes += info.success
                except DatasetError as error:
                    if isinstance(error.__cause__, OSError):
                        raise  # a full disk concerns every episode
                    skipped.append(f"episode {name}: {error}")
            if progress is not None:
                progress(done + 1, len(reader.episodes))
        if not stored:
            listed = "\n  ".join(skipped[:5])
            raise DatasetError(f"no episode could be imported to {output}:\n  {listed or 'the source holds none'}")
        masks = {key: [stored[name] for name in names if name in stored] for key, names in reader.masks.items()}
        if not (masks.get("train") and masks.get("valid")):
            # One of them without the other, as of a source that is a part of its dataset, would overlap with the other
            # one as derived here.
            masks = {key: names for key, names in masks.items() if key not in ("train", "valid")}
        # Masks that follow from the episodes stay derived, so that they grow with the dataset.
        derived = Dataset.open(writer.path).masks
        own = {key for key, names in masks.items() if names and names != derived.get(key)}
        if own & {"train", "valid"}:
            # An episode may be in neither of the two; each alone says less than both.
            own |= masks.keys() & {"train", "valid"}
        with disk_errors(writer.path / META):
            kept = {key: names for key, names in masks.items() if key in own}
            write_json(writer.path / META, {**read_meta(writer.path), "masks": kept})
    return ImportResult(
        episodes=len(stored), successes=successes, steps=steps, skipped=tuple(skipped), notes=tuple(reader.notes)
    )


def _check_layout(arrays: Arrays, embodiment: Embodiment, where: str) -> None:
    """Raise :class:`DatasetError` unless names, types and sizes are those of a dataset of ``embodiment``."""
    expected = step_shapes(embodiment)
    for name, array in arrays.items():
        if not _ARRAY_NAME.fullmatch(name) or array.dtype.kind not in "iufb":
            raise DatasetError(f"{where}: array '{name}' of type {array.dtype} is not one that an episode has.")
        if array.shape[1:] != expected.get(name, array.shape[1:]):
            raise DatasetError(f"{where}: '{name}' is {array.shape[1:]} per step; the robot says {expected[name]}.")


def refuse_existing(output: Path) -> None:
    """Raise :class:`DatasetError` if ``output`` is a dataset: an import makes a new one."""
    if (output / META).exists():
        raise DatasetError(f"{output} is a dataset already. Import to a new folder, then `simtoreal data merge`.")


def refuse_overwriting(output: Path) -> None:
    """Raise :class:`DatasetError` if the file ``output`` exists: an export makes a new one."""
    if output.exists():
        raise DatasetError(f"{output} exists; exports never overwrite. Choose another name or move it away.")


def unique_name(name: str, taken: Container[str], suffix: str = "") -> str:
    """Return ``name``, or with the first number (before ``suffix``) that makes it none of ``taken``."""
    unique, number = name, 2
    while unique in taken:
        unique = f"{name.removesuffix(suffix)}_{number}{suffix}"
        number += 1
    return unique


def observation_names(keys: Iterable[str], images: Iterable[str], *, taken: Iterable[str] = ()) -> dict[str, str]:
    """Return source key -> our observation key, without collisions among them and with ``taken``.

    Images become ``<camera>_image``: ``observation.images.front``, ``front_rgb`` and ``front_image`` are all
    ``front_image``; a key that only says that it is an image (``img``) is ``camera_image``.
    """
    names: dict[str, str] = {}
    used, image_keys = set(taken), set(images)
    for key in keys:
        name = re.sub(r"^observation\.(images\.)?", "", key) if key.startswith("observation.") else key
        name = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "unnamed"
        if key in image_keys:
            stem = re.sub(r"_?(images?|img|rgb)$", "", name) or "camera"
            name = f"{stem}{IMAGE_SUFFIX}"
        names[key] = unique_name(name, used, IMAGE_SUFFIX if key in image_keys else "")
        used.add(names[key])
    return names


def step_name(key: str, taken: Container[str] = ()) -> str:
    """Return the name of a further number per step: ``step/`` and ``key``, in the characters that names may have."""
    return unique_name("step/" + re.sub(r"[^A-Za-z0-9_.:-]", "_", key), taken)


def pixel_scale(episodes: Iterable[np.ndarray]) -> float:
    """Return the factor that brings the pixels of a camera to [0, 255]: 255 if its floats are in [0, 1], otherwise 1.

    Decided by all ``episodes`` of the source, of which those after the first value above 1 are not asked for: of one
    episode in the dark, whose pixels are 0 and 1, it could not be told.
    """
    return 255.0 if all(frames.dtype.kind == "f" and frames.max(initial=0) <= 1 for frames in episodes) else 1.0


def to_image(frames: np.ndarray, where: str, scale: float) -> np.ndarray:
    """Return frames ``(T, H, W, 3)`` of any numeric type as uint8 RGB.

    Floats are accepted in [0, 1] or [0, 255] (diffusion_policy stores whole numbers as float32).

    Args:
        frames: of an episode.
        where: named in errors.
        scale: see :func:`pixel_scale`.

    Raises:
        DatasetError: values outside of both ranges.
    """
    if frames.dtype == np.uint8:
        return frames
    low, high = float(frames.min(initial=0)), float(frames.max(initial=0))
    if not (low >= 0 and high * scale <= 255):
        raise DatasetError(f"{where}: pixel values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255")
    return np.rint(frames * scale).astype(np.uint8)


def single_precision(values: np.ndarray) -> np.ndarray:
    """Return floats as float32, in which policies compute (robosuite writes float64), and anything else as it is."""
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def is_image_shape(shape: tuple[int, ...]) -> bool:
    """Whether one step of this shape is an RGB image (height, width, 3) of at least 8 x 8 pixels."""
    return len(shape) == 3 and shape[2] == 3 and min(shape[:2]) >= 8


def require_size(count: int, where: str, limit: int = LARGEST_EPISODE_BYTES) -> None:
    """Raise :class:`DatasetError` if ``count`` bytes are more than ``limit``."""
    if count > limit:
        raise DatasetError(f"{where} would take {count / 1e9:.1f} GB of memory; at most {limit / 1e9:.1f} GB are read.")


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that ``text`` of bounded size says.

    Raises:
        DatasetError: too large, not JSON or not an object.
    """
    require_size(len(text), where, LARGEST_JSON_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{where}: is not a JSON object.")
    return content


def judge_success(rewards: Sequence[np.ndarray]) -> list[bool | None]:
    """Whether each episode succeeded, as far as sparse rewards tell; None when they do not.

    Rewards that are only 0 and 1, and 1 somewhere in the file, mark successes (robosuite's convention). Others are
    a dense or absent reward, from which success cannot be read.
    """
    present = [reward for reward in rewards if len(reward)]
    sparse = bool(present) and all(np.isin(reward, (0, 1)).all() for reward in present)
    if not sparse or not any(reward.any() for reward in present):
        return [None] * len(rewards)
    return [bool(reward.any()) for reward in rewards]

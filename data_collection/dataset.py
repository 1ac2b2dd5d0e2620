"""A dataset is a folder of episode files with one description beside them.

::

    my_dataset/
      meta.json              embodiment, task specifications, format version, episode list, masks, statistics
      episodes/000000.hdf5   see simtoreal.data_collection.episode
      dataset.hdf5           the same episodes as robomimic sees them; derived, never read by us

``episodes/`` is the truth. ``meta.json`` lists the episodes that were complete when it was written, so that one
that goes missing later is noticed; newer files (of a collection that is still running or was killed) are used as well.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from simtoreal.data_collection.compatibility import collection_mode
from simtoreal.data_collection.episode import (
    Arrays,
    EpisodeInfo,
    embodiment_digest,
    open_episode,
    read_episode,
    read_info,
)
from simtoreal.data_collection.filters import accepted_episodes, filter_masks, has_filter
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError, EmbodimentMismatchError, closest

FORMAT = "simtoreal-dataset"
FORMAT_VERSION = 1
META = "meta.json"
EPISODES = "episodes"
VIEW = "dataset.hdf5"


class Dataset:
    """A dataset opened for reading. Create it with :meth:`open`.

    Attributes:
        path: folder.
        embodiment: robot, cameras and action space of every episode.
        tasks: task name -> specification as a plain dictionary.
        episodes: every episode, in the order of its number.
        meta: content of ``meta.json``.
    """

    def __init__(self, path: Path, embodiment: Embodiment, meta: dict[str, Any], episodes: list[EpisodeInfo]) -> None:
        self.path, self.embodiment, self.meta, self.episodes = path, embodiment, meta, episodes

    @classmethod
    def open(cls, path: str | Path, *, embodiment: Embodiment | None = None) -> Dataset:
        """Open a dataset folder and check every episode's structure (not its values).

        Args:
            path: the folder.
            embodiment: what the caller needs the data to be made with, if it matters.

        Raises:
            DatasetError: something is missing, damaged or unsafe.
            EmbodimentMismatchError: the data are of another embodiment than asked for, or mixed.
        """
        path = Path(path)
        meta = read_meta(path)
        own = Embodiment.from_dict(meta["embodiment"])
        if embodiment is not None:
            own.require_equal(embodiment, f"dataset {path}", "what is needed here")
        files = episode_files(path)
        if not isinstance(meta.get("episodes", {}), dict):
            raise DatasetError(
                f"{path / META}: 'episodes' is not a mapping of episodes to steps. Run 'simtoreal data recover {path}'."
            )
        missing = sorted(set(meta.get("episodes", {})) - {file.stem for file in files})
        if missing:
            raise DatasetError(
                f"{path / EPISODES / missing[0]}.hdf5: is missing ({len(missing)} of {len(meta['episodes'])} listed in "
                f"{META}). Restore it, or run 'simtoreal data recover {path}' to continue without it."
            )
        episodes = [_check_episode(file, own, path) for file in files]
        return cls(path, own, meta, episodes)

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Task name -> specification."""
        return dict(self.meta["tasks"])

    @property
    def task(self) -> dict[str, Any]:
        """Specification of the only task.

        Raises:
            DatasetError: the dataset holds several tasks.
        """
        if len(self.tasks) != 1:
            raise DatasetError(f"{self.path}: holds several tasks ({', '.join(self.tasks)}); one was expected here.")
        return next(iter(self.tasks.values()))

    @property
    def masks(self) -> dict[str, list[str]]:
        """Name -> episode numbers. ``train`` and ``valid`` are derived unless ``meta.json`` sets them; if it sets one,
        the other is derived from what that leaves.

        Every filter has a mask of its name with the successes that it accepts. Episodes that no longer exist (lost,
        or set aside as damaged) are in none.

        Raises:
            DatasetError: the masks in ``meta.json`` are damaged, or name an episode in another form than its file.
                Damaged filters are left out with a warning.
        """
        own = self.meta.get("masks", {})
        if not isinstance(own, dict) or not all(_is_mask(members) for members in own.values()):
            raise DatasetError(
                f"{self.path / META}: 'masks' is not a mapping of names to lists of episode numbers. Correct it."
            )
        for mask, members in own.items():
            short = [member for member in members if member != f"{int(member):06d}"]
            if short:
                raise DatasetError(
                    f"{self.path / META}: mask '{mask}' names episode '{short[0]}'; write '{int(short[0]):06d}', as "
                    "its file is called."
                )
        known = {episode.name for episode in self.episodes}
        own = {mask: [member for member in members if member in known] for mask, members in own.items()}
        derived = split_masks(self.episodes)
        # A failure may agree with the base data in every step; it is still not worth imitating.
        good = set(derived.get("success", ()))
        accepted = {name: [one for one in members if one in good] for name, members in filter_masks(self.path).items()}
        return {**_beside(own, derived), **accepted, **own}

    def filter(self, mask: str | None = None) -> list[EpisodeInfo]:
        """Episodes of a mask (``train``, ``valid``, ``success``, ``failure`` or one of the dataset's own), or all.

        Raises:
            DatasetError: there is no such mask, its filter is damaged, or it names no episode.
        """
        if mask is None:
            return list(self.episodes)
        masks = self.masks
        if mask not in masks:
            if has_filter(self.path, mask):
                accepted_episodes(self.path, mask)  # Says what is wrong with it.
            raise DatasetError(f"{self.path}: has no mask '{mask}'. {closest(mask, masks)}")
        chosen = set(masks[mask])
        found = [episode for episode in self.episodes if episode.name in chosen]
        if not found:
            raise DatasetError(f"{self.path}: mask '{mask}' selects none of {len(self.episodes)} episodes.")
        return found

    def read(self, episode: EpisodeInfo, names: Iterable[str] | None = None) -> Arrays:
        """Arrays of an episode by their path in its file, e.g. ``"obs/proprio"``; all of them by default.

        Raises:
            DatasetError: the file is damaged or lacks an array.
        """
        if episode.path is None:
            raise DatasetError("this episode was not read from a file; take it from Dataset.episodes.")
        return read_episode(episode.path, names)[1]


def episode_files(path: Path) -> list[Path]:
    """Episode files of the dataset folder ``path``, in the order of their numbers.

    Anything else in the folder, such as a copy named ``000003 (copy).hdf5``, is no episode; ``data check`` names it.
    """
    files = (path / EPISODES).glob("*.hdf5")
    return sorted(file for file in files if file.stem.isascii() and file.stem.isdecimal())


def _is_mask(members: object) -> bool:
    return isinstance(members, list) and all(isinstance(name, str) and name.isdecimal() for name in members)


def _beside(own: Mapping[str, list[str]], derived: dict[str, list[str]]) -> dict[str, list[str]]:
    """Derived masks, whose ``train`` and ``valid`` have nothing in common with the other one as ``own`` sets it.

    robomimic and everything else that is given these masks learns from ``train`` and believes what ``valid`` says.
    """
    found = dict(derived)
    for mask, other, candidates in (("train", "valid", "success"), ("valid", "train", "valid")):
        if other in own and mask not in own:
            taken = set(own[other])
            found[mask] = [name for name in derived.get(candidates, ()) if name not in taken]
    return {mask: members for mask, members in found.items() if members}


def without_half_a_split(masks: dict[str, list[str]], before: Container[str]) -> dict[str, list[str]]:
    """Masks without ``train`` and ``valid`` if only one of them is left of the two that there were ``before``.

    Both follow anew from the episodes then, so that something is held out again.
    """
    split = ("train", "valid")
    if all(mask in before for mask in split) and not all(mask in masks for mask in split):
        return {mask: members for mask, members in masks.items() if mask not in split}
    return masks


def read_meta(path: Path) -> dict[str, Any]:
    """Content of ``meta.json`` of the dataset folder ``path``.

    Raises:
        DatasetError: not a dataset, or of another format version.
    """
    file = path / META
    if not file.is_file():
        raise DatasetError(f"{path}: is not a dataset, it has no {META}. Make one with 'simtoreal collect --output'.")
    try:
        meta = json.loads(file.read_text())
    except ValueError as error:
        raise DatasetError(f"{file}: is not valid JSON ({error}). Restore it from a copy.") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DatasetError(f'{file}: is not the description of a dataset; expected "format": "{FORMAT}".')
    if meta.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{file}: has format version {meta.get('format_version')}, this program reads {FORMAT_VERSION}. "
            "Use the simtoreal version that wrote it."
        )
    for key in ("embodiment", "tasks"):
        if not isinstance(meta.get(key), Mapping):
            raise DatasetError(f"{file}: key '{key}' is missing or not a mapping.")
    for name, task in meta["tasks"].items():
        if not isinstance(task, Mapping):
            raise DatasetError(f"{file}: tasks.{name} is {task!r:.60}; expected a mapping. Restore it from a copy.")
    return meta


def _check_episode(file: Path, embodiment: Embodiment, dataset: Path) -> EpisodeInfo:
    with open_episode(file) as handle:
        info = read_info(handle, file)
        if info.embodiment != embodiment_digest(embodiment):
            raise EmbodimentMismatchError(
                f"{file}: was recorded with another embodiment (digest {info.embodiment}) than its dataset {dataset} "
                f"(digest {embodiment_digest(embodiment)}). Move it to a dataset of its own."
            )
        for name, shape in step_shapes(embodiment).items():
            if name in handle and handle[name].shape != (info.steps, *shape):
                raise EmbodimentMismatchError(
                    f"{file}: '{name}' has shape {handle[name].shape}, but the dataset's embodiment says "
                    f"{(info.steps, *shape)}."
                )
    return info


def step_shapes(embodiment: Embodiment) -> dict[str, tuple[int, ...]]:
    """Array -> shape of one step, for the arrays whose shape the embodiment decides; episodes may lack observations."""
    images = {f"obs/{camera.name}_image": (camera.height, camera.width, 3) for camera in embodiment.cameras}
    return {"actions": (embodiment.action.dim,), **images, "obs/proprio": (embodiment.proprio.dim,)}


def split_masks(episodes: list[EpisodeInfo]) -> dict[str, list[str]]:
    """Masks that follow from the episodes: ``all``, ``success``, ``failure``, ``train``/``valid`` over the successful
    ones, and ``static``/``move``, those collected without and with scene motion (a world model must not learn from the
    latter that things move by themselves). A mask without members does not exist.

    Every tenth success validates. Which episodes do only depends on their order, so the split of a growing dataset
    is stable.
    """
    successes = [episode.name for episode in episodes if episode.success]
    failures = [episode.name for episode in episodes if not episode.success]
    valid = successes[9::10] or successes[1:][-1:]
    train = [name for name in successes if name not in set(valid)]
    everything = [episode.name for episode in episodes]
    masks = {"all": everything, "success": successes, "failure": failures, "train": train, "valid": valid}
    for episode in episodes:
        masks.setdefault(collection_mode(episode.extra), []).append(episode.name)
    return {name: members for name, members in masks.items() if members}

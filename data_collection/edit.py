"""Repairs, joins and divides datasets without ever deleting an episode: files are hard-linked or copied."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import (
    EPISODES,
    META,
    Dataset,
    episode_files,
    read_meta,
    without_half_a_split,
)
from simtoreal.data_collection.derive import Derivation, Member, derive
from simtoreal.data_collection.episode import (
    Arrays,
    EpisodeInfo,
    open_episode,
    read_episode,
    read_info,
)
from simtoreal.data_collection.filters import FOLDER as FILTERS
from simtoreal.data_collection.filters import read_filter, write_filter
from simtoreal.data_collection.same_recording import first_of_recordings
from simtoreal.data_collection.takes import EmptyPartError, read_part
from simtoreal.data_collection.writer import DAMAGED, DatasetWriter
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, DatasetError, DiskError
from simtoreal.envs.files import fsync_folder, write_json


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What :func:`recover` did.

    Attributes:
        recovered: episodes made from parts, marked ``aborted``.
        emptied: parts without any complete step, or whose episode was stored already; removed, as nothing is lost.
        set_aside: unreadable files, moved to ``damaged/``, with the reason.
        missing: numbers of listed episodes that no longer exist.
    """

    recovered: tuple[EpisodeInfo, ...]
    emptied: tuple[Path, ...]
    set_aside: tuple[tuple[Path, str], ...]
    missing: tuple[str, ...]


def recover(path: str | Path) -> Recovery:
    """Bring a dataset back into a readable state after a crash, a full disk or a lost file.

    Parts of killed writers become episodes with ``failure="aborted"`` (not used for training by default),
    files that cannot be read to the last value move to ``damaged/``, and the description is rebuilt from what is there.
    Masks and filters forget the episodes that are gone.

    Raises:
        DatasetError: not a dataset, being written by a process, or the disk is full.
    """
    path = Path(path)
    meta = read_meta(path)
    episodes = path / EPISODES
    recovered: list[EpisodeInfo] = []
    emptied: list[Path] = []
    set_aside: list[tuple[Path, str]] = []
    with DatasetWriter(path, Embodiment.from_dict(meta["embodiment"]), {}) as writer:
        for file in episode_files(path):
            try:
                read_episode(file)
            except DatasetError as error:
                set_aside.append((_set_aside(file, path), str(error)))
        listed = meta["episodes"] if isinstance(meta.get("episodes"), dict) else {}
        missing = sorted(set(listed) - {file.stem for file in episode_files(path)})
        missing = [name for name in missing if name not in {file.stem for file, _ in set_aside}]
        for part in sorted(episodes.glob("*.part")):
            try:
                info, arrays = read_part(part)
            except DatasetError as error:
                if isinstance(error, EmptyPartError) or part.stat().st_size == 0:
                    part.unlink()
                    emptied.append(part)
                else:
                    set_aside.append((_set_aside(part, path), str(error)))
                continue
            if _already_stored(info, arrays, path):
                # Killed after the episode was written and before its journal was removed.
                part.unlink()
                emptied.append(part)
                continue
            try:
                target = writer.add(arrays, info)
            except DiskError:
                raise
            except DatasetError as error:
                set_aside.append((_set_aside(part, path), str(error)))
                continue
            part.unlink()
            with open_episode(target) as handle:
                recovered.append(read_info(handle, target))
        # Dropping lost episodes is the user's decision, made by running this command.
        existing = {file.stem for file in episode_files(path)}
        _drop_from_filters(path, existing)
        write_json(path / META, {**meta, "episodes": {}, "masks": _without_lost(meta.get("masks", {}), existing)})
    return Recovery(
        recovered=tuple(recovered), emptied=tuple(emptied), set_aside=tuple(set_aside), missing=tuple(missing)
    )


def _without_lost(masks: Any, existing: Container[str]) -> Any:
    """Masks without episodes that do not exist; what is damaged otherwise is left for its own error."""
    if not isinstance(masks, dict) or not all(isinstance(members, list) for members in masks.values()):
        return masks
    kept = {mask: [one for one in members if not _is_name(one) or one in existing] for mask, members in masks.items()}
    return without_half_a_split({mask: members for mask, members in kept.items() if members}, masks)


def _is_name(member: object) -> bool:
    return isinstance(member, str) and member.isdecimal() and member == f"{int(member):06d}"


def _drop_from_filters(path: Path, existing: Container[str]) -> None:
    """Take verdicts on episodes that do not exist out of the filters, so that no later episode inherits them."""
    for file in sorted((path / FILTERS).glob("*.json")):
        try:
            stored = read_filter(path, file.stem)
        except DatasetError:
            continue  # Damaged: whoever uses it is told.
        kept = [name for name in stored.episodes if name in existing]
        if not kept:
            file.unlink()
            file.with_suffix(".npz").unlink(missing_ok=True)
        elif len(kept) < len(stored.episodes):
            write_filter(path, stored.only(kept))


def _already_stored(info: EpisodeInfo, arrays: Arrays, path: Path) -> bool:
    for file in episode_files(path):
        with open_episode(file) as handle:
            stored = read_info(handle, file)
        if (stored.started, stored.seed, stored.steps) == (info.started, info.seed, info.steps):
            content = read_episode(file)[1]
            # An operator's verdict is in the rewards and dones of the episode, not in those of its journal.
            compared = {name: array for name, array in arrays.items() if name not in ("rewards", "dones")}
            if all(np.array_equal(content.get(name), array) for name, array in compared.items()):
                return True
    return False


def _set_aside(file: Path, dataset: Path) -> Path:
    folder = dataset / DAMAGED
    folder.mkdir(exist_ok=True)
    target = folder / file.name
    number = 1
    while target.exists():
        target = folder / f"{file.stem}.{number}{file.suffix}"
        number += 1
    os.replace(file, target)
    fsync_folder(file.parent)
    return target


def merge(sources: Sequence[str | Path], output: str | Path) -> Derivation:
    """Make a dataset of the episodes of several, in their order, by hard links where the file system allows.

    An episode that several of them hold, as when one was merged of others before, is taken once, from the first of
    them or the one that trimmed it: twice it would count twice, and be learnt from in one place while it is held out in
    the other. Masks that
    somebody set are merged as well, and so are filters that were made in the same way in all sources. A source that is
    the base data of a filter need not have it.

    Raises:
        ConfigError: nothing to merge, or a dataset twice.
        DatasetError: a source is damaged, two hold different specifications of a task, or ``output`` is not empty.
        EmbodimentMismatchError: the sources were made with different embodiments.
    """
    if not sources:
        raise ConfigError("merge needs at least one dataset.")
    if len({Path(source).resolve() for source in sources}) < len(sources):
        raise ConfigError("merge was given the same dataset twice; its episodes would count twice.")
    datasets = [Dataset.open(source) for source in sources]
    first = datasets[0]
    for other in datasets[1:]:
        first.embodiment.require_equal(other.embodiment, f"dataset {first.path}", f"dataset {other.path}")
    tasks: dict[str, dict[str, object]] = {}
    for dataset in datasets:
        for name, task in dataset.tasks.items():
            if tasks.setdefault(name, task) != task:
                raise DatasetError(
                    f"{dataset.path}: has another specification of task '{name}' than a dataset before it. "
                    "Merge only data of the same task version."
                )
    members, repeated = _each_once(datasets)
    made = derive(members, first.embodiment, tasks, Path(output), operation="merge")
    return dataclasses.replace(made, notes=(*repeated, *made.notes))


def _each_once(datasets: Sequence[Dataset]) -> tuple[list[Member], list[str]]:
    """Every recording of the datasets from one of them only, and one line per dataset that others are taken instead of.

    That is the one with the fewest steps, which was trimmed last, and among equals the first.
    """
    episodes = [(dataset, episode) for dataset in datasets for episode in dataset.episodes]
    firsts = first_of_recordings([episode for _, episode in episodes])
    taken: dict[int, tuple[Dataset, EpisodeInfo]] = {}
    for first, (dataset, episode) in zip(firsts, episodes, strict=True):
        if first not in taken or episode.steps < taken[first][1].steps:
            taken[first] = dataset, episode
    members: list[Member] = []
    repeated: dict[Path, list[Path]] = {}
    for first, (dataset, episode) in zip(firsts, episodes, strict=True):
        source = taken[first][0]
        if source is dataset:
            members.append(Member(dataset=dataset, episode=episode))
        else:
            repeated.setdefault(dataset.path, []).append(source.path)
    notes = [
        f"{len(sources)} episodes of {path} are in {', '.join(map(str, dict.fromkeys(sources)))} too; they are taken "
        "once, as they are trimmed, described and masked there"
        for path, sources in repeated.items()
    ]
    return members, notes


def split(
    source: str | Path, output: str | Path, fractions: Mapping[str, float], *, seed: int = 0
) -> dict[str, Derivation]:
    """Divide the episodes of a dataset at random into datasets ``output/<name>``, by hard links where possible.

    Args:
        source: dataset to divide; it is left as it is.
        output: folder of the new datasets.
        fractions: name -> share of the episodes, positive, together at most 1.
        seed: of the random assignment.

    Raises:
        ConfigError: the fractions are wrong, or a part would be empty.
        DatasetError: the source is damaged, or a part's folder is not empty.
    """
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) <= 0 or total > 1 + 1e-9:
        raise ConfigError(f"fractions {dict(fractions)} must be positive and sum to at most 1 (they sum to {total:g}).")
    dataset = Dataset.open(source)
    count = len(dataset.episodes)
    order = np.random.default_rng(seed).permutation(count)
    ends = np.round(np.cumsum(list(fractions.values())) * count).astype(int)
    starts = np.concatenate([[0], ends[:-1]])
    chosen = {name: sorted(order[a:b]) for name, a, b in zip(fractions, starts, ends, strict=True)}
    empty = [name for name, members in chosen.items() if not members]
    if empty:
        raise ConfigError(f"part '{empty[0]}' would be empty: {fractions[empty[0]]:g} of {count} episodes.")
    parts: dict[str, Derivation] = {}
    try:
        for name, numbers in chosen.items():
            members = [Member(dataset=dataset, episode=dataset.episodes[i]) for i in numbers]
            parts[name] = derive(members, dataset.embodiment, dataset.tasks, Path(output) / name, operation="split")
    except BaseException:
        for part in parts.values():
            shutil.rmtree(part.dataset.path, ignore_errors=True)
        raise
    return parts

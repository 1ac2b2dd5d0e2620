"""New datasets made of episodes of old ones, by hard links: nothing is copied or changed that stays the same.

What belongs to an episode goes with it: its metadata lies in its file; memberships in masks and the verdicts of filters
are carried over to its new number.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.compatibility import Scores, collection_mode
from simtoreal.data_collection.dataset import EPISODES, META, Dataset, read_meta, without_half_a_split
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, disk_errors
from simtoreal.data_collection.filters import FOLDER as FILTERS
from simtoreal.data_collection.filters import Filter, FilteredEpisode, action_digest, read_filter, write_filter
from simtoreal.data_collection.writer import new_dataset
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.files import atomic_path, write_json

DERIVED = "derived"


@dataclass(frozen=True, kw_only=True)
class Member:
    """An episode of a new dataset.

    Attributes:
        dataset: where it comes from.
        episode: which one.
        rewritten: new content, or None to link the file as it is.
        recut: whether steps were left out, so that verdicts on its steps are no longer valid.
    """

    dataset: Dataset
    episode: EpisodeInfo
    rewritten: tuple[Arrays, EpisodeInfo] | None = None
    recut: bool = False


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """A finished new dataset.

    Attributes:
        dataset: opened.
        names: new name of every member, in their order.
        notes: what could not be carried over, one line each.
    """

    dataset: Dataset
    names: tuple[str, ...]
    notes: tuple[str, ...]


def derive(
    members: Sequence[Member],
    embodiment: Embodiment,
    tasks: Mapping[str, Mapping[str, object]],
    output: Path,
    *,
    operation: str,
) -> Derivation:
    """Make the dataset ``output`` of ``members``, in their order.

    ``meta.json`` gets the masks of the sources and, under ``derived``, where every episode comes from.

    Raises:
        DatasetError: ``output`` holds something already, a filter of a source is damaged, or the disk is full.
    """
    names = [f"{number:06d}" for number in range(len(members))]
    filters, notes = _carry_filters(members, names, output)
    masks = _carry_masks(members, names)
    with new_dataset(output, embodiment, tasks) as writer:
        for member in members:
            if member.rewritten is not None:
                writer.add(*member.rewritten)
            else:
                link_or_copy(Path(str(member.episode.path)), writer.next_path())
        for one in filters:
            write_filter(writer.path, one)
        origins = {
            name: {
                "dataset": str(member.dataset.path.resolve()),
                "episode": member.episode.name,
                "linked": member.rewritten is None,
            }
            for name, member in zip(names, members, strict=True)
        }
        meta = read_meta(writer.path)
        meta["masks"] = masks
        meta[DERIVED] = {"operation": operation, "episodes": origins}
        with disk_errors(writer.path / META):
            write_json(writer.path / META, json.loads(json.dumps(meta)))
    return Derivation(dataset=Dataset.open(output), names=tuple(names), notes=tuple(notes))


def _sources(members: Sequence[Member]) -> list[Dataset]:
    return list({id(member.dataset): member.dataset for member in members}.values())


def _carry_masks(members: Sequence[Member], names: Sequence[str]) -> dict[str, list[str]]:
    """Masks that somebody set; those that follow from the episodes or from filters follow again."""
    kept = sorted({mask for source in _sources(members) for mask in source.meta.get("masks", {})})
    resolved = {id(source): source.masks for source in _sources(members)}
    masks = {
        mask: [
            name
            for name, member in zip(names, members, strict=True)
            if member.episode.name in resolved[id(member.dataset)].get(mask, ())
        ]
        for mask in kept
    }
    return without_half_a_split({mask: chosen for mask, chosen in masks.items() if chosen}, kept)


def _carry_filters(members: Sequence[Member], names: Sequence[str], output: Path) -> tuple[list[Filter], list[str]]:
    """Return the filters that all sources have in the same form or are the base data of; say which are left out."""
    sources = _sources(members)
    known = sorted({path.stem for source in sources for path in (source.path / FILTERS).glob("*.json")})
    filters, notes = [], []
    for name in known:
        having = [source for source in sources if (source.path / FILTERS / f"{name}.json").is_file()]
        stored = {id(source): read_filter(source.path, name) for source in having}
        first = next(iter(stored.values()))
        # A filter has thresholds for the collection modes of its own dataset; those of the others come along.
        thresholds = {mode: values for one in stored.values() for mode, values in one.thresholds.items()}
        first = dataclasses.replace(first, thresholds=thresholds)
        if any(
            _rule(one) != _rule(first) or not one.thresholds.items() <= thresholds.items() for one in stored.values()
        ):
            notes.append(f"filter '{name}' is left out: the datasets' filters of this name were made differently")
            continue
        lacking = {id(source): _kept_whole(first, source) for source in sources if id(source) not in stored}
        stored |= {source: verdicts for source, verdicts in lacking.items() if verdicts is not None}
        if missing := len(sources) - len(stored):
            notes.append(
                f"filter '{name}' is left out: {missing} of the datasets do not have it and are not the base data that "
                f"it was made with. Run 'simtoreal data filter {output}'."
            )
            continue
        pairs = [
            (new, stored[id(member.dataset)], member)
            for new, member in zip(names, members, strict=True)
            if member.episode.name in stored[id(member.dataset)].episodes
        ]
        cut = [new for new, _, member in pairs if member.recut]
        pairs = [pair for pair in pairs if not pair[2].recut]
        if cut:
            notes.append(f"filter '{name}' no longer covers {len(cut)} episodes that were cut; run it again")
        if pairs:
            filters.append(_select(first, pairs))
    return filters, notes


def _rule(one: Filter) -> dict[str, Any]:
    """How a filter was made. Base data are known by the actions of their episodes, wherever they lie."""
    known = "base_episodes" in one.settings
    return {key: value for key, value in one.settings.items() if not (known and key == "against")}


def _kept_whole(like: Filter, base: Dataset) -> Filter | None:
    """Return what ``like`` says of the dataset it was made against, or None if ``base`` is not that.

    Base data are recognised by their actions, wherever they lie. They are kept without being judged, so there are no
    scores (NaN). Failures are no base data and get no verdict.
    """
    digests = like.settings.get("base_episodes")
    successes = [episode for episode in base.episodes if episode.success]
    if not isinstance(digests, list) or not successes:
        return None
    for episode in successes:
        if action_digest(base.read(episode, ["actions"])["actions"]) not in digests:
            return None
    episodes = {
        episode.name: FilteredEpisode(
            steps=episode.steps, seed=episode.seed, operator=episode.operator, mode=collection_mode(episode.extra),
            base=True, compatibility=1.0, bad_steps=0, kept_steps=episode.steps, accepted=True,
        )
        for episode in successes
    }  # fmt: skip
    unknown = {name: np.full(verdict.steps, np.nan, np.float32) for name, verdict in episodes.items()}
    return dataclasses.replace(
        like,
        episodes=episodes,
        keep={name: np.ones(verdict.steps, dtype=bool) for name, verdict in episodes.items()},
        scores={name: Scores(rows, rows) for name, rows in unknown.items()},
    )


def _select(like: Filter, chosen: Sequence[tuple[str, Filter, Member]]) -> Filter:
    """Verdicts of every member's filter under its new name, and under that of who acted as it is now."""
    named = [(new, one, member.episode.name, member) for new, one, member in chosen]
    return dataclasses.replace(
        like,
        episodes={
            new: dataclasses.replace(one.episodes[old], operator=_description(member).operator)
            for new, one, old, member in named
        },
        keep={new: one.keep[old] for new, one, old, _ in named},
        scores={new: one.scores[old] for new, one, old, _ in named},
    )


def _description(member: Member) -> EpisodeInfo:
    return member.episode if member.rewritten is None else member.rewritten[1]


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, or a copy where hard links are impossible.

    Raises:
        DatasetError: the disk is full.
    """
    try:
        os.link(source, target)
        return
    except FileExistsError:
        raise
    except OSError:
        # Another file system, or one without hard links: the copy below reports every real problem.
        pass
    with disk_errors(target), atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def origin_problems(dataset: Dataset) -> list[str]:
    """Return one line per episode that is said to be the same file as one of another dataset and is not.

    Sources that no longer exist are not a problem: a derived dataset stands alone.
    """
    derived: Any = dataset.meta.get(DERIVED)
    if derived is None:
        return []
    origins = derived.get("episodes") if isinstance(derived, dict) else None
    if not isinstance(origins, dict):
        return [f"{META}: '{DERIVED}' is not a description of where the episodes come from"]
    lines = []
    for episode in dataset.episodes:
        origin = origins.get(episode.name)
        if not isinstance(origin, dict) or not {"dataset", "episode", "linked"} <= origin.keys():
            continue  # Added later, by a collection that went on.
        source = Path(str(origin["dataset"])) / EPISODES / f"{origin['episode']}.hdf5"
        if origin["linked"] and source.is_file() and not _same_content(Path(str(episode.path)), source):
            lines.append(f"{episode.name}: differs from {source}, which it was linked to")
    return lines


def _same_content(first: Path, second: Path) -> bool:
    if os.path.samefile(first, second):
        return True
    with open(first, "rb") as one, open(second, "rb") as other:
        while True:
            blocks = one.read(1 << 20), other.read(1 << 20)
            if blocks[0] != blocks[1]:
                return False
            if not blocks[0]:
                return True

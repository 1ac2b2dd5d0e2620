"""A corrected copy of a dataset: episodes left out, relabelled or trimmed. The source is never changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.derive import Derivation, Member, derive
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, read_episode
from simtoreal.data_collection.inspect_motion import MotionScale, idle_steps
from simtoreal.data_collection.same_recording import TRIMMED, recorded_range
from simtoreal.envs.errors import ConfigError

# Idle steps that stay before the first and after the last motion, so that a policy sees where it begins and ends.
KEPT_REST_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What to change.

    Attributes:
        remove: episode numbers to leave out.
        keep_mask: leave out everything that is not in this mask.
        only: episode numbers that the changes below apply to; empty: all that stay.
        instruction: new language instruction.
        operator: new name of who acted.
        trim_idle: leave out the steps before the first motion, and after the last one unless the task's success was
            found there.
    """

    remove: frozenset[int] = frozenset()
    keep_mask: str | None = None
    only: frozenset[int] = frozenset()
    instruction: str | None = None
    operator: str | None = None
    trim_idle: bool = False

    @property
    def rewrites(self) -> bool:
        """Whether the content of episodes changes."""
        return self.instruction is not None or self.operator is not None or self.trim_idle


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """What :func:`edit` did.

    Attributes:
        derivation: the new dataset.
        removed: names of the episodes left out.
        rewritten: names (in the source) of the episodes with new content; all others are links.
        trimmed_steps: steps left out of them.
    """

    derivation: Derivation
    removed: tuple[str, ...]
    rewritten: tuple[str, ...]
    trimmed_steps: int


def parse_numbers(words: Sequence[str], flag: str) -> frozenset[int]:
    """Return the numbers of texts such as ``3`` and ``7-9`` (both ends included).

    Raises:
        ConfigError: one is neither.
    """
    numbers: set[int] = set()
    for word in words:
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"{flag}: '{word}' is not an episode number or a range of them, such as 3 or 7-9")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def edit(source: str | Path, output: str | Path, changes: Edit) -> EditResult:
    """Write the corrected dataset ``output``; what does not change is linked, not copied.

    Raises:
        ConfigError: nothing to do, an episode that does not exist, or nothing would be left.
        DatasetError: the source is damaged, a mask does not exist, or ``output`` holds episodes.
    """
    dataset = Dataset.open(source)
    if changes.only and not changes.rewrites:
        raise ConfigError(
            "--episodes says what a change applies to: give --relabel-instruction, --set-operator or --trim-idle too"
        )
    if not (changes.remove or changes.keep_mask or changes.rewrites):
        raise ConfigError("nothing to change: give --remove, --keep-mask, --relabel-instruction, --set-operator, ...")
    known = {int(episode.name) for episode in dataset.episodes}
    for flag, numbers in (("--remove", changes.remove), ("--episodes", changes.only)):
        if numbers - known:
            raise ConfigError(f"{flag}: {source} has no episode {min(numbers - known)}; it has {_ranges(known)}")
    kept = [episode for episode in dataset.filter(changes.keep_mask) if int(episode.name) not in changes.remove]
    if not kept:
        raise ConfigError(f"no episode of {source} would be left")
    scale = MotionScale.of(dataset) if changes.trim_idle else None
    members, trimmed = [], 0
    for episode in kept:
        rewritten = None
        if changes.rewrites and (not changes.only or int(episode.name) in changes.only):
            rewritten = _change(episode, changes, scale)
        cut = episode.steps - len(rewritten[0]["actions"]) if rewritten is not None else 0
        trimmed += cut
        members.append(Member(dataset=dataset, episode=episode, rewritten=rewritten, recut=cut > 0))
    derivation = derive(members, dataset.embodiment, dataset.tasks, Path(output), operation="edit")
    staying = {episode.name for episode in kept}
    return EditResult(
        derivation=derivation,
        removed=tuple(episode.name for episode in dataset.episodes if episode.name not in staying),
        rewritten=tuple(member.episode.name for member in members if member.rewritten is not None),
        trimmed_steps=trimmed,
    )


def _change(episode: EpisodeInfo, changes: Edit, scale: MotionScale | None) -> tuple[Arrays, EpisodeInfo] | None:
    """Return the new content of an episode, or None if it stays as it is."""
    info, arrays = read_episode(Path(str(episode.path)))
    fields: dict[str, Any] = {}
    if changes.operator is not None and changes.operator != info.operator:
        fields["operator"] = changes.operator
    if changes.instruction is not None and (info.instruction, *info.instructions) != (changes.instruction,) * 2:
        fields |= {"instruction": changes.instruction, "instructions": (changes.instruction,)}
        if "step/instruction" in arrays:
            arrays["step/instruction"] = np.zeros_like(arrays["step/instruction"])
    start, stop = trimmed_range(arrays, scale) if scale is not None else (0, info.steps)
    if stop - start < info.steps:
        arrays = {name: array[start:stop] for name, array in arrays.items()}
        # Cut twice, an episode still says where its steps were when it was recorded.
        earlier, steps = recorded_range(info)
        trimmed = {"start": earlier + start, "steps": steps}
        # What is known about the sensors was measured over all steps.
        fields["extra"] = {**{key: value for key, value in info.extra.items() if key != "sensors"}, TRIMMED: trimmed}
        fields["duration_s"] = info.duration_s * (stop - start) / info.steps
    return (arrays, dataclasses.replace(info, **fields)) if fields else None


def trimmed_range(arrays: Arrays, scale: MotionScale) -> tuple[int, int]:
    """Return the first step that stays and the one after the last that does.

    An episode without any motion stays whole: that is for a person to judge.
    """
    idle = idle_steps(arrays, scale)
    moving = np.flatnonzero(~idle)
    if not len(moving):
        return 0, len(idle)
    start = max(0, int(moving[0]) - KEPT_REST_STEPS)
    stop = min(len(idle), int(moving[-1]) + 1 + KEPT_REST_STEPS)
    # Files from elsewhere may say that the goal was reached by a reward of 1 only; other rewards mark nothing.
    rewards = arrays["rewards"]
    rewarded = (rewards == 1) & bool(np.isin(rewards, (0, 1)).all())
    done = np.flatnonzero((arrays["dones"] != 0) | rewarded)
    return start, max(stop, int(done[0]) + 1) if len(done) else stop


def _ranges(numbers: set[int]) -> str:
    """Short form of a set of numbers, e.g. ``0-24, 30``."""
    ordered, parts = sorted(numbers), []
    first = last = ordered[0] if ordered else 0
    for number in [*ordered[1:], None]:
        if number is not None and number == last + 1:
            last = number
            continue
        parts.append(f"{first}-{last}" if last > first else str(first))
        first = last = number if number is not None else 0
    return ", ".join(parts) if ordered else "none"

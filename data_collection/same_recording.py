"""Which episodes hold steps of the same recording: copies, and copies that were trimmed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simtoreal.data_collection.episode import EpisodeInfo, array_names, content_checksums, open_episode

TRIMMED = "trimmed"


def recorded_range(info: EpisodeInfo) -> tuple[int, int]:
    """Return the first step of an episode in its recording, and the steps of that recording."""
    match info.extra.get(TRIMMED):
        case {"start": int(start), "steps": int(steps)}:
            return start, steps
    return 0, info.steps


def first_of_recordings(episodes: Sequence[EpisodeInfo]) -> list[int]:
    """Return for every episode the index of the first one with steps of the same recording: its own if it is that.

    Copies have the same arrays, whatever is said about them. A trimmed one has those of the other in the steps that
    both have, but for the instructions.

    Raises:
        DatasetError: an episode is damaged.
    """
    firsts: list[int] = []
    copies: dict[tuple[str, frozenset[tuple[str, int]]], int] = {}
    candidates: dict[tuple[str, int, int], list[int]] = {}
    for index, episode in enumerate(episodes):
        content = episode.task, frozenset(content_checksums(Path(str(episode.path))).items())
        others = candidates.setdefault((episode.task, episode.seed, recorded_range(episode)[1]), [])
        if content not in copies:
            same = (other for other in others if _same_where_both(episodes[other], episode))
            copies[content] = firsts[first] if (first := next(same, None)) is not None else index
            others.append(index)
        firsts.append(copies[content])
    return firsts


def _same_where_both(first: EpisodeInfo, second: EpisodeInfo) -> bool:
    if TRIMMED not in first.extra and TRIMMED not in second.extra:
        return False  # Else they would be copies.
    starts = [recorded_range(info)[0] for info in (first, second)]
    begin = max(starts)
    end = min(start + info.steps for start, info in zip(starts, (first, second), strict=True))
    with open_episode(Path(str(first.path))) as one, open_episode(Path(str(second.path))) as other:
        names = array_names(one)
        return (
            begin < end
            and names == array_names(other)
            and all(
                np.array_equal(
                    one[name][begin - starts[0] : end - starts[0]], other[name][begin - starts[1] : end - starts[1]]
                )
                for name in names
                if name != "step/instruction"
            )
        )

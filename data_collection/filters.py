"""Filters: which steps of a dataset to learn from, stored beside the episodes and never instead of them.

::

    my_dataset/
      filters/compatible.json   how it was made, thresholds, scores and verdict of every episode, table per operator
      filters/compatible.npz    per episode ``<name>`` (T,) bool keep, ``<name>/lik`` and ``<name>/nov`` (T,) float32

The accepted episodes, successes only, are the mask of the same name (``simtoreal train --mask compatible``); the steps
are what ``simtoreal train --filter compatible`` learns from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.compatibility import Scores
from simtoreal.data_collection.episode import EpisodeInfo, disk_errors
from simtoreal.envs.errors import ConfigError, DatasetError, closest
from simtoreal.envs.files import atomic_path, write_json

FOLDER = "filters"
FORMAT, FORMAT_VERSION = "simtoreal-filter", 1
RESERVED = frozenset({"all", "train", "valid", "success", "failure", "static", "move"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Bytes of an npz member besides its values.
_HEADER_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class FilteredEpisode:
    """Verdict on one episode.

    Attributes:
        steps: length T, which must not have changed when the filter is used.
        seed, operator: of the episode.
        mode: ``static`` or ``move``; decides the thresholds.
        base: the episode is base data itself and was kept without being judged.
        compatibility: mean over its steps, in [0, 1]; 1 for base data that were merged in later (their scores are NaN).
        bad_steps, kept_steps: counts.
        accepted: a success, of which at most the tolerated number of steps is bad.
    """

    steps: int
    seed: int
    operator: str
    mode: str
    base: bool
    compatibility: float
    bad_steps: int
    kept_steps: int
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A filter of a dataset.

    Attributes:
        name: of the filter and of its mask.
        settings: how it was made (method, base and the digests of its episodes, scorer, keys, seed), JSON-compatible.
        thresholds: collection mode -> thresholds as plain values.
        episodes: episode name -> verdict.
        keep: episode name -> ``(T,)`` bool.
        scores: episode name -> scores.
        report: anything else worth keeping (behaviour entropy, provenance), JSON-compatible.
    """

    name: str
    settings: dict[str, Any]
    thresholds: dict[str, dict[str, float]]
    episodes: dict[str, FilteredEpisode]
    keep: dict[str, np.ndarray]
    scores: dict[str, Scores]
    report: dict[str, Any] = field(default_factory=dict)

    def operators(self) -> list[dict[str, Any]]:
        """One row per operator (base episodes apart): episodes, steps, mean compatibility, bad share, accepted."""
        rows: dict[tuple[str, bool], dict[str, Any]] = {}
        for episode in self.episodes.values():
            empty = {"operator": episode.operator, "base": episode.base, "episodes": 0, "steps": 0, "accepted": 0}
            row = rows.setdefault(
                (episode.operator, episode.base), {**empty, "bad_steps": 0, "kept_steps": 0, "compatibility": 0.0}
            )
            row["episodes"] += 1
            for key in ("steps", "bad_steps", "kept_steps", "accepted"):
                row[key] += int(getattr(episode, key))
            row["compatibility"] += episode.compatibility * episode.steps
        for row in rows.values():
            row["compatibility"] /= max(row["steps"], 1)
            row["bad_share"] = row["bad_steps"] / max(row["steps"], 1)
        return [rows[key] for key in sorted(rows, key=lambda key: (not key[1], key[0]))]

    def only(self, names: Sequence[str]) -> Filter:
        """The same filter with its verdicts on the episodes ``names`` only."""
        return dataclasses.replace(
            self,
            episodes={name: self.episodes[name] for name in names},
            keep={name: self.keep[name] for name in names},
            scores={name: self.scores[name] for name in names},
        )


def action_digest(actions: np.ndarray) -> str:
    """Digest of recorded actions, which identifies an episode wherever it is linked."""
    return hashlib.sha256(np.ascontiguousarray(actions, dtype=np.float32).tobytes()).hexdigest()[:32]


def check_name(name: str) -> str:
    """Return ``name`` if it can name a filter.

    Raises:
        ConfigError: it is not a plain word, or means something else already.
    """
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise ConfigError(
            f"filter name '{name}': expected letters, digits, '_' and '-', beginning with a letter or digit, and none "
            f"of {', '.join(sorted(RESERVED))}"
        )
    return name


def write_filter(dataset: Path, result: Filter) -> Path:
    """Store a filter, replacing one of the same name; return the path of its description.

    Raises:
        ConfigError: the name cannot be used.
        DatasetError: the disk is full or not writable.
    """
    folder = Path(dataset) / FOLDER
    description, arrays = (folder / f"{check_name(result.name)}{suffix}" for suffix in (".json", ".npz"))
    content: dict[str, np.ndarray] = {}
    for name, keep in result.keep.items():
        content[name] = keep.astype(bool)
        content[f"{name}/lik"] = result.scores[name].likelihood.astype(np.float32)
        content[f"{name}/nov"] = result.scores[name].novelty.astype(np.float32)
    # The description comes last and names the arrays by digest: a crash in between is noticed, not misread.
    with disk_errors(arrays):
        with atomic_path(arrays) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, **content)
        write_json(
            description,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "name": result.name,
                "arrays_sha256": _digest(arrays),
                "settings": result.settings,
                "thresholds": result.thresholds,
                "operators": result.operators(),
                "episodes": {name: dataclasses.asdict(episode) for name, episode in result.episodes.items()},
                "report": result.report,
            },
        )
    return description


def has_filter(dataset: str | Path, name: str) -> bool:
    """Whether a dataset has a filter of this name, whatever state it is in."""
    return (Path(dataset) / FOLDER / f"{name}.json").is_file()


def read_filter(dataset: str | Path, name: str) -> Filter:
    """Read and check a filter.

    Raises:
        DatasetError: there is none of this name, or it is damaged.
    """
    dataset = Path(dataset)
    known = [path.stem for path in (dataset / FOLDER).glob("*.json")]
    if name not in known:
        raise DatasetError(
            f"{dataset}: has no filter '{name}'. {closest(name, known)} Make one with 'simtoreal data filter'."
        )
    path = dataset / FOLDER / f"{name}.json"
    content = _read_description(path)
    episodes = _verdicts(content, path)
    keep, scores = _read_arrays(path.with_suffix(".npz"), episodes, content)
    return Filter(
        name=name, settings=content["settings"], thresholds=content["thresholds"], episodes=episodes, keep=keep,
        scores=scores, report=content.get("report", {}),
    )  # fmt: skip


def accepted_episodes(dataset: Path, name: str) -> list[str]:
    """Return the names of the episodes that a filter accepts.

    Raises:
        DatasetError: there is no such filter, or its description is damaged.
    """
    path = dataset / FOLDER / f"{name}.json"
    return [name for name, episode in _verdicts(_read_description(path), path).items() if episode.accepted]


def filter_masks(dataset: Path) -> dict[str, list[str]]:
    """Filter name -> names of its accepted episodes, for every filter of a dataset folder.

    A damaged filter is left out with a warning: what does not use it works without it.
    """
    masks = {}
    for path in sorted((dataset / FOLDER).glob("*.json")):
        try:
            masks[path.stem] = accepted_episodes(dataset, path.stem)
        except DatasetError as error:
            warnings.warn(f"mask '{path.stem}' is left out: {error}", stacklevel=2)
    return masks


def kept_steps(dataset: Path, name: str, episodes: Sequence[EpisodeInfo]) -> list[np.ndarray]:
    """Return the ``(T,)`` bool masks of ``episodes``, in their order.

    Raises:
        DatasetError: there is no such filter, it is damaged, or it does not cover an episode as it is now.
    """
    stored = read_filter(dataset, name)
    for episode in episodes:
        verdict = stored.episodes.get(episode.name)
        if verdict is None or (verdict.steps, verdict.seed) != (episode.steps, episode.seed):
            what = "was not there" if verdict is None else f"had {verdict.steps} steps and seed {verdict.seed}"
            raise DatasetError(
                f"{dataset}: episode {episode.name} ({episode.steps} steps, seed {episode.seed}) {what} when filter "
                f"'{name}' was made. Run 'simtoreal data filter' again."
            )
    return [stored.keep[episode.name] for episode in episodes]


def _read_description(path: Path) -> dict[str, Any]:
    remedy = "Delete it, or run 'simtoreal data filter' again."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read as JSON ({error}). {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DatasetError(f'{path}: is not a filter; expected "format": "{FORMAT}". {remedy}')
    if content.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path}: has format version {content.get('format_version')}, not {FORMAT_VERSION}. {remedy}"
        )
    for key in ("settings", "thresholds", "episodes"):
        if not isinstance(content.get(key), dict):
            raise DatasetError(f"{path}: key '{key}' is missing or not a mapping. {remedy}")
    return content


def _verdicts(content: Mapping[str, Any], path: Path) -> dict[str, FilteredEpisode]:
    kinds = {"int": int, "str": str, "bool": bool, "float": (int, float)}
    verdicts = {}
    for name, entry in content["episodes"].items():
        for key in dataclasses.fields(FilteredEpisode):
            value = entry.get(key.name) if isinstance(entry, dict) else None
            wrong = not isinstance(value, kinds[str(key.type)])  # type: ignore[arg-type]
            if wrong or (isinstance(value, bool) and key.type != "bool"):
                raise DatasetError(
                    f"{path}: episodes.{name}.{key.name} is {value!r}; expected {key.type}. "
                    "Run 'simtoreal data filter' again."
                )
        verdicts[str(name)] = FilteredEpisode(
            **{key.name: entry[key.name] for key in dataclasses.fields(FilteredEpisode)}
        )
    return verdicts


def _read_arrays(
    path: Path, episodes: Mapping[str, FilteredEpisode], content: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Scores]]:
    remedy = "Run 'simtoreal data filter' again."
    try:
        if _digest(path) != content.get("arrays_sha256"):
            raise DatasetError(f"{path}: does not belong to its description (a write was interrupted). {remedy}")
        keep, scores = {}, {}
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
        with np.load(path, allow_pickle=False) as arrays:
            for name, episode in episodes.items():
                rows = {}
                for suffix, dtype in (("", np.bool_), ("/lik", np.float32), ("/nov", np.float32)):
                    member = f"{name}{suffix}"
                    if sizes.get(f"{member}.npy", 0) > np.dtype(dtype).itemsize * episode.steps + _HEADER_BYTES:
                        raise DatasetError(f"{path}: '{member}' is larger than its {episode.steps} steps. {remedy}")
                    rows[suffix] = arrays[member]
                    if rows[suffix].shape != (episode.steps,) or rows[suffix].dtype != dtype:
                        raise DatasetError(
                            f"{path}: '{member}' is {rows[suffix].dtype} {rows[suffix].shape}; expected "
                            f"{np.dtype(dtype)} ({episode.steps},). {remedy}"
                        )
                keep[name], scores[name] = rows[""], Scores(rows["/lik"], rows["/nov"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: is missing or damaged ({error}). {remedy}") from error
    return keep, scores


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

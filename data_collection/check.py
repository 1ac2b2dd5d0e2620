"""Derives everything that a dataset says about itself anew and reports every discrepancy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from simtoreal.data_collection import filters
from simtoreal.data_collection.dataset import EPISODES, META, VIEW, Dataset, episode_files, read_meta, step_shapes
from simtoreal.data_collection.derive import origin_problems
from simtoreal.data_collection.episode import (
    CHECKSUMS,
    Arrays,
    EpisodeInfo,
    array_names,
    checksums,
    embodiment_digest,
    open_episode,
    read_info,
)
from simtoreal.data_collection.same_recording import first_of_recordings
from simtoreal.data_collection.statistics import dataset_statistics, difference
from simtoreal.data_collection.view import expected_view, read_view
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError, SimtorealError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One discrepancy.

    Attributes:
        where: file or part of the dataset, e.g. ``episodes/000003.hdf5``.
        what: what is wrong, and what was expected.
        remedy: the command or step that repairs it, or empty.
    """

    where: str
    what: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Outcome of :func:`check`.

    Attributes:
        problems: every discrepancy found.
        episodes, steps, arrays: how much was read without one.
        notes: what could not be checked and is not wrong.
    """

    problems: tuple[Problem, ...]
    episodes: int
    steps: int
    arrays: int
    notes: tuple[str, ...] = ()


def check(path: str | Path) -> CheckResult:
    """Check a dataset folder: description, episodes down to every value, masks, filters, statistics, view and links.

    Never raises for a damaged dataset; that is what it reports.

    Raises:
        DatasetError: the folder is not a dataset at all.
    """
    path = Path(path)
    if not path.is_dir() or not ((path / META).exists() or (path / EPISODES).exists()):
        raise DatasetError(f"{path}: is not a dataset; expected a folder with {META} and {EPISODES}/.")
    try:
        meta = read_meta(path)
        embodiment = Embodiment.from_dict(meta["embodiment"])
    except SimtorealError as error:
        problem = Problem(where=META, what=str(error), remedy="restore it from a copy")
        return CheckResult(problems=(problem,), episodes=0, steps=0, arrays=0)
    checker = _Checker(path, meta, embodiment)
    checker.run()
    return CheckResult(
        problems=tuple(checker.problems),
        episodes=len(checker.infos),
        steps=sum(info.steps for info in checker.infos),
        arrays=checker.arrays,
        notes=tuple(checker.notes),
    )


class _Checker:
    def __init__(self, path: Path, meta: dict[str, Any], embodiment: Embodiment) -> None:
        self.path, self.meta, self.embodiment = path, meta, embodiment
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.infos: list[EpisodeInfo] = []
        self.arrays = 0
        self.unchecked = 0
        self.layout: dict[tuple[str, str], tuple[tuple[int, ...], str, str]] = {}

    def problem(self, where: str, what: str, remedy: str = "") -> None:
        self.problems.append(Problem(where=where, what=what, remedy=remedy))

    def run(self) -> None:
        self.check_files()
        files = episode_files(self.path)
        for file in files:
            self.check_episode(file)
        if self.unchecked:
            self.notes.append(f"{self.unchecked} episodes of an older version hold no checksums: flipped bits in "
                              "their values cannot be noticed")  # fmt: skip
        if len(self.infos) < len(files):
            self.notes.append("masks, filters, statistics and view were not compared: some episodes cannot be read")
            return
        dataset = Dataset(self.path, self.embodiment, self.meta, self.infos)
        parts = (self.check_masks, self.check_recordings, self.check_filters, self.check_statistics, self.check_view)
        for part in (*parts, self.check_origins):
            try:
                part(dataset)
            except SimtorealError as error:
                self.problem(part.__name__.removeprefix("check_"), str(error))

    # -- files ---------------------------------------------------------------------------------------

    def check_files(self) -> None:
        if self.meta.get("embodiment_digest") != embodiment_digest(self.embodiment):
            self.problem(META, "'embodiment_digest' is not that of 'embodiment'", "restore it from a copy")
        listed = self.meta.get("episodes")
        if not isinstance(listed, dict):
            self.problem(META, "'episodes' is not a list of the episodes", f"simtoreal data recover {self.path}")
            listed = {}
        folder = self.path / EPISODES
        files = {file.stem for file in episode_files(self.path)}
        for name in sorted(set(listed) - files):
            remedy = f"restore it, or drop it with: simtoreal data recover {self.path}"
            self.problem(f"{EPISODES}/{name}.hdf5", f"is missing, but listed in {META}", remedy)
        for name in sorted(files - set(listed)):
            self.problem(f"{EPISODES}/{name}.hdf5", f"is not listed in {META}", f"simtoreal data recover {self.path}")
        for file in sorted(folder.iterdir()) if folder.is_dir() else []:
            if file.suffix == ".part":
                self.problem(f"{EPISODES}/{file.name}", "is unfinished", f"simtoreal data recover {self.path}")
            elif file.suffix != ".hdf5" or file.stem not in files:
                self.problem(f"{EPISODES}/{file.name}", "does not belong here", "move it away")

    # -- one episode ---------------------------------------------------------------------------------

    def check_episode(self, file: Path) -> None:
        where = f"{EPISODES}/{file.name}"
        try:
            with open_episode(file) as handle:
                info = read_info(handle, file)
                stored, text = handle.attrs.get(CHECKSUMS), str(handle.attrs["episode"])
                arrays = {name: handle[name][()] for name in array_names(handle)}
        except (SimtorealError, ValueError, OverflowError, MemoryError, UnicodeError) as error:
            remedy = f"restore it, or set it aside with: simtoreal data recover {self.path}"
            self.problem(where, str(error).removeprefix(f"{file}: "), remedy)
            return
        self.infos.append(info)
        self.arrays += len(arrays)
        for what in self._episode_problems(info, arrays, file):
            self.problem(where, what)
        if stored is None:
            self.unchecked += 1
            return
        for what in _checksum_problems(str(stored), arrays, text):
            self.problem(where, what, "restore it from a copy")

    def _episode_problems(self, info: EpisodeInfo, arrays: Arrays, file: Path) -> Iterator[str]:
        listed = self.meta.get("episodes")
        count = listed.get(file.stem, info.steps) if isinstance(listed, dict) else info.steps
        if count != info.steps:
            yield f"has {info.steps} steps, {META} says {count}"
        if info.embodiment != embodiment_digest(self.embodiment):
            yield "was recorded with another embodiment than the dataset's"
        if info.task not in self.meta["tasks"]:
            yield f"is of task '{info.task}', which {META} does not describe"
        if info.success == bool(info.failure):
            yield f"says success {info.success} and failure '{info.failure}'; exactly one of them must hold"
        period = self.embodiment.control_period_s
        if info.duration_s and abs(info.duration_s - info.steps * period) > period + 0.5 * info.duration_s:
            yield f"lasts {info.duration_s:.2f} s by its description, {info.steps * period:.2f} s by its steps"
        yield from self._array_problems(info, arrays, file)
        if not set(np.unique(arrays["dones"])) <= {0, 1}:
            yield "'dones' holds something else than 0 and 1"
        if "step/instruction" in arrays:
            index, texts = arrays["step/instruction"], len(info.instructions)
            if index.min() < 0 or index.max() >= max(texts, 1):
                yield f"'step/instruction' points beyond the {texts} instructions of the episode"
        if "step/timestamp_ns" in arrays and (np.diff(arrays["step/timestamp_ns"].astype(np.int64)) <= 0).any():
            step = int(np.flatnonzero(np.diff(arrays["step/timestamp_ns"].astype(np.int64)) <= 0)[0])
            yield f"'step/timestamp_ns' does not increase after step {step}"
        for name, columns in info.columns.items():
            array = arrays.get(f"step/{name}")
            if array is not None and array.ndim == 2 and array.shape[1] != len(columns):
                yield f"'step/{name}' has {array.shape[1]} columns, but names for {len(columns)}"

    def _array_problems(self, info: EpisodeInfo, arrays: Arrays, file: Path) -> Iterator[str]:
        expected = {**step_shapes(self.embodiment), "rewards": (), "dones": ()}
        for name, array in arrays.items():
            if len(array) != info.steps:
                yield f"'{name}' has {len(array)} rows, the episode {info.steps} steps"
                continue
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                row = int(np.flatnonzero(~np.isfinite(array.reshape(info.steps, -1)).all(axis=1))[0])
                yield f"'{name}' is not finite at step {row}"
            if name in expected and array.shape[1:] != expected[name]:
                yield f"'{name}' has the shape {array.shape[1:]} per step; the embodiment says {expected[name]}"
            # What objects there are depends on the task.
            now = (array.shape[1:], str(array.dtype), file.stem)
            shape, kind, first = self.layout.setdefault((info.task, name), now)
            if name.startswith("obs/") and (shape, kind) != now[:2]:
                yield f"'{name}' is {now[1]} {now[0]}, but {kind} {shape} in episode {first}"

    # -- the dataset as a whole ----------------------------------------------------------------------

    def check_masks(self, dataset: Dataset) -> None:
        masks = self.meta.get("masks", {})
        known = {info.name for info in self.infos}
        if not isinstance(masks, dict):
            self.problem(META, "'masks' is not a mapping of names to episodes")
            return
        for mask, members in masks.items():
            if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
                self.problem(META, f"mask '{mask}' is not a list of episode numbers")
                continue
            unknown = sorted(set(members) - known)
            if unknown:
                self.problem(META, f"mask '{mask}' names {len(unknown)} episodes that do not exist, e.g. {unknown[0]}")
            if len(set(members)) < len(members):
                self.problem(META, f"mask '{mask}' names an episode twice")
            if filters.has_filter(self.path, mask):
                remedy = f"take the mask out of 'masks' in {self.path / META}"
                self.problem(META, f"mask '{mask}' hides what the filter of this name accepts", remedy)
        train, valid = (masks.get(mask) for mask in ("train", "valid"))
        if isinstance(train, list) and isinstance(valid, list) and (both := [one for one in train if one in valid]):
            what = f"masks 'train' and 'valid' share {len(both)} episodes, e.g. {both[0]}"
            self.problem(META, what, "take them out of one of the two")

    def check_recordings(self, dataset: Dataset) -> None:
        masks = dataset.masks
        recordings: dict[int, set[str]] = {}
        for first, info in zip(first_of_recordings(dataset.episodes), dataset.episodes, strict=True):
            recordings.setdefault(first, set()).add(info.name)
        for names in recordings.values():
            train, valid = (sorted(names.intersection(masks.get(mask, ()))) for mask in ("train", "valid"))
            if train and valid and train != valid:
                what = f"mask 'valid' has {valid[0]} and 'train' {train[0]}, steps of the same recording"
                self.problem(META, what, f"simtoreal data edit {self.path} --output NEW --remove {int(valid[0])}")

    def check_filters(self, dataset: Dataset) -> None:
        folder = self.path / filters.FOLDER
        remedy = "run 'simtoreal data filter' again"
        infos = {info.name: info for info in self.infos}
        stems = {file.stem for file in folder.glob("*.json")} | {file.stem for file in folder.glob("*.npz")}
        for name in sorted(stems):
            where = f"{filters.FOLDER}/{name}"
            try:
                stored = filters.read_filter(self.path, name)
            except SimtorealError as error:
                self.problem(where, str(error))
                continue
            for episode, verdict in stored.episodes.items():
                if episode not in infos:
                    self.problem(where, f"judges episode {episode}, which does not exist", remedy)
                elif (verdict.steps, verdict.seed) != (infos[episode].steps, infos[episode].seed):
                    self.problem(where, f"judged another episode {episode} than the one that is there now", remedy)
                elif verdict.kept_steps != int(stored.keep[episode].sum()):
                    kept = int(stored.keep[episode].sum())
                    self.problem(where, f"says {verdict.kept_steps} kept steps of {episode}, marks {kept}", remedy)

    def check_statistics(self, dataset: Dataset) -> None:
        stored = self.meta.get("statistics")
        lines = difference(stored if isinstance(stored, dict) else {}, dataset_statistics(dataset))
        for line in lines:
            self.problem(f"{META} statistics", line, f"simtoreal data recover {self.path}")

    def check_origins(self, dataset: Dataset) -> None:
        for line in origin_problems(dataset):
            self.problem("links", line)

    def check_view(self, dataset: Dataset) -> None:
        remedy = f"simtoreal data recover {self.path}"
        file = self.path / VIEW
        try:
            with h5py.File(file, "r") as view:
                found = read_view(view)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            self.problem(VIEW, f"is missing or cannot be read ({error})", remedy)
            return
        wanted = expected_view(dataset)
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                self.problem(VIEW, f"{key} is {found.get(key)!r:.120}, should be {wanted.get(key)!r:.120}", remedy)


def _checksum_problems(stored: str, arrays: Arrays, text: str) -> Iterator[str]:
    try:
        wanted = json.loads(stored)
        wanted = {str(name): int(value) for name, value in wanted.items()}
    except (ValueError, TypeError, AttributeError):
        yield "its checksums are damaged"
        return
    found = checksums(arrays, text)
    for name in sorted({*wanted, *found}):
        what = f"'{name}'" if name else "the description"
        if name not in found:
            yield f"{what} is missing"
        elif wanted.get(name) != found[name]:
            yield f"{what} is not what was written: its checksum differs"

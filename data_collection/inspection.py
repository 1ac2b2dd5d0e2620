"""Looks at a dataset as a careful person would: what is in it, what is wrong with it, which episodes to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection import filters
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.diversity import dataset_diversity
from simtoreal.data_collection.diversity_unlabelled import unlabelled_diversity
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, array_names, open_episode
from simtoreal.data_collection.inspect_findings import Finding, dataset_findings, episode_findings
from simtoreal.data_collection.inspect_motion import MotionScale, certain_motion, describe_motion
from simtoreal.data_collection.inspect_sensors import (
    describe_images,
    describe_scene_motion,
    describe_stamps,
    describe_timing,
)
from simtoreal.data_collection.inspect_set import (
    Fingerprint,
    describe_starts,
    find_drift,
    find_duplicates,
    fingerprint,
    outliers,
    trimmed_copies,
)
from simtoreal.envs.errors import DatasetError, SimtorealError

# Of every array of the first observation, this many dimensions are watched for drift.
_DRIFT_DIMENSIONS = 64
# Of logarithms: an outlier differs by a factor of two at least.
_LOG_DEVIATION = 0.15

Layout = dict[str, tuple[tuple[int, ...], str]]
"""Array -> shape of one step and type."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything that was found.

    Attributes:
        dataset: opened.
        episodes: one JSON-compatible description per episode, in their order; see :func:`describe_episode`.
        summary: of the dataset as a whole, JSON-compatible.
        findings: about the dataset, most serious first.
        suspicious: episode name -> findings about it, worst episode first.
    """

    dataset: Dataset
    episodes: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    findings: tuple[Finding, ...]
    suspicious: dict[str, tuple[Finding, ...]]


def inspect(path: str | Path, *, images: bool = True, progress: Callable[[int, int], None] | None = None) -> Inspection:
    """Inspect a dataset folder.

    Args:
        path: the folder.
        images: read the images as well, to find frozen ones; most of the time goes there.
        progress: told the episodes done and their number.

    Raises:
        DatasetError: damaged (``simtoreal data check`` says everything that is wrong), or empty.
    """
    dataset = Dataset.open(path)
    if not dataset.episodes:
        raise DatasetError(f"{path}: holds no episodes to inspect.")
    scale = MotionScale.of(dataset)
    episodes, prints, starts, layouts = [], [], [], []
    for number, info in enumerate(dataset.episodes):
        described, print_, start, layout = describe_episode(dataset, info, scale, images=images)
        episodes.append(described)
        prints.append(print_)
        starts.append(start)
        layouts.append(layout)
        if progress is not None:
            progress(number + 1, len(dataset.episodes))
    mark_outliers(episodes)
    mark_layouts(episodes, layouts)
    compatibility = _compatibility(dataset, episodes)
    trimmed = trimmed_copies(dataset.episodes)
    cut = {pair["second"] for pair in trimmed}
    duplicates = [*trimmed, *(pair for pair in find_duplicates(prints) if pair["second"] not in cut)]
    by_name = {episode["name"]: episode for episode in episodes}
    for pair in duplicates:
        by_name[pair["second"]]["duplicate_of"] = pair["first"]
    summary = {
        "episodes": len(episodes),
        "steps": sum(episode["steps"] for episode in episodes),
        "seconds": sum(episode["steps"] for episode in episodes) * dataset.embodiment.control_period_s,
        "successes": sum(episode["success"] for episode in episodes),
        "control_hz": dataset.embodiment.control_hz,
        "embodiment": dataset.embodiment.name,
        "action_mode": dataset.embodiment.action.mode,
        "action_names": list(dataset.embodiment.action.names),
        "operators": _operators(episodes),
        "duplicates": duplicates,
        "drift": find_drift(_drift_series(dataset, episodes, starts)),
        "starts": describe_starts(dataset, starts),
        "compatibility": compatibility,
        "behavior": _behavior(dataset),
        "modes": unlabelled_diversity(dataset)[0] if any(episode["success"] for episode in episodes) else None,
        "images_read": images,
    }
    suspicious = {
        episode["name"]: found
        for episode in episodes
        if (found := tuple(episode_findings(episode, dataset.embodiment)))
    }
    ordered = sorted(suspicious, key=lambda name: (-sum(finding.weight for finding in suspicious[name]), name))
    return Inspection(
        dataset=dataset,
        episodes=tuple(episodes),
        summary=summary,
        findings=tuple(dataset_findings(summary, episodes, dataset.embodiment)),
        suspicious={name: suspicious[name] for name in ordered},
    )


def describe_episode(
    dataset: Dataset, info: EpisodeInfo, scale: MotionScale, *, images: bool
) -> tuple[dict[str, Any], Fingerprint, Arrays, Layout]:
    """Return what :func:`inspect` says about an episode, its fingerprint, where it began, and the layout of its arrays.

    Raises:
        DatasetError: the episode is damaged.
    """
    period = dataset.embodiment.control_period_s
    with open_episode(Path(str(info.path))) as file:
        names = array_names(file)
        layout = {name: (tuple(file[name].shape[1:]), str(file[name].dtype)) for name in names}
    pictures = [name for name in names if name.startswith("obs/") and len(layout[name][0]) == 3]
    arrays = dataset.read(info, [name for name in names if name not in pictures and name != "states"])
    poses = certain_motion(arrays, scale)
    described: dict[str, Any] = {
        "name": info.name,
        "task": info.task,
        "operator": info.operator,
        "source": info.source,
        "instruction": info.instruction,
        "success": info.success,
        "failure": info.failure,
        "success_assumed": bool(info.extra.get("success_assumed", False)),
        "seed": info.seed,
        "steps": info.steps,
        "timing": describe_timing(arrays, period),
        "stamps": describe_stamps(arrays, info),
        "motion": describe_motion(arrays, scale),
        "scene_motion": describe_scene_motion(arrays, info, period),
        "collected_with_motion": "motion" in info.extra,
        "cameras": {},
    }
    for name in pictures if images else ():
        described["cameras"][name.removeprefix("obs/")] = describe_images(dataset.read(info, [name])[name], poses)
    start = {
        name: array[0]
        for name, array in arrays.items()
        if name.startswith("obs/") and array.ndim == 2 and array.dtype.kind == "f"
    }
    return described, fingerprint(info, arrays, scale), start, layout


def mark_outliers(episodes: list[dict[str, Any]]) -> None:
    """Add ``outlier`` to every episode: quantity -> deviation from the other episodes of its task and outcome."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for episode in episodes:
        episode["outlier"] = {}
        groups.setdefault((episode["task"], episode["success"]), []).append(episode)
    for members in groups.values():
        series = {
            "length": [float(np.log(episode["steps"])) for episode in members],
            "jerk": [float(np.log(episode["motion"]["action_jerk"] + 1e-9)) for episode in members],
        }
        for name, values in series.items():
            for episode, deviation in zip(members, outliers(values, _LOG_DEVIATION), strict=True):
                episode["outlier"][name] = float(deviation)


def mark_layouts(episodes: list[dict[str, Any]], layouts: list[Layout]) -> None:
    """Add ``layout`` to every episode: what its arrays have that the first episode of its task has not, or lack."""
    first: dict[str, Layout] = {}
    for episode, layout in zip(episodes, layouts, strict=True):
        wanted = first.setdefault(episode["task"], layout)
        # Observations and actions must agree; which logs there are beside them may differ.
        names = [name for name in sorted({*wanted, *layout}) if not name.startswith(("step/", "states"))]
        episode["layout"] = [
            f"{name} is {_form(layout.get(name))}, not {_form(wanted.get(name))}"
            for name in names
            if layout.get(name) != wanted.get(name)
        ]


def _form(layout: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if layout is None else f"{layout[1]} {layout[0]}"


def _operators(episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for episode in episodes:
        row = rows.setdefault(
            episode["operator"],
            {"operator": episode["operator"], "episodes": 0, "successes": 0, "steps": 0, "idle": 0.0, "jerk": []},
        )
        row["episodes"] += 1
        row["successes"] += int(episode["success"])
        row["steps"] += episode["steps"]
        row["idle"] += episode["motion"]["idle_share"] * episode["steps"]
        row["jerk"].append(episode["motion"]["action_jerk"])
    for row in rows.values():
        row["idle_share"] = row.pop("idle") / row["steps"]
        row["median_action_jerk"] = float(np.median(row.pop("jerk")))
    return sorted(rows.values(), key=lambda row: -row["steps"])


def _drift_series(dataset: Dataset, episodes: list[dict[str, Any]], starts: list[Arrays]) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {}
    shared = [
        name
        for name in starts[0]
        if all(start.get(name, np.zeros(0)).shape == starts[0][name].shape for start in starts)
    ]
    for name in shared:
        width = min(len(starts[0][name]), _DRIFT_DIMENSIONS)
        known = dataset.embodiment.proprio.names if name == "obs/proprio" else ()
        for index in range(width):
            label = known[index] if index < len(known) else f"{name}[{index}]"
            series[f"first {label}"] = [float(start[name][index]) for start in starts]
    for camera in episodes[0]["cameras"]:
        if all(camera in episode["cameras"] for episode in episodes):
            series[f"brightness of {camera}"] = [episode["cameras"][camera]["brightness"] for episode in episodes]
    series["length"] = [float(episode["steps"]) for episode in episodes]
    return series


def _compatibility(dataset: Dataset, episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts of every filter of the dataset, which are added to the episodes as well."""
    by_name = {episode["name"]: episode for episode in episodes}
    found = []
    for name in sorted(path.stem for path in (dataset.path / filters.FOLDER).glob("*.json")):
        stored = filters.read_filter(dataset.path, name)
        covered = [episode for episode in stored.episodes if episode in by_name]
        for episode in covered:
            verdict = stored.episodes[episode]
            by_name[episode].setdefault("compatibility", {})[name] = {
                "compatibility": verdict.compatibility,
                "bad_steps": verdict.bad_steps,
                "accepted": verdict.accepted,
                "base": verdict.base,
            }
        entropy = stored.report.get("entropy") if isinstance(stored.report, dict) else None
        found.append({"filter": name, "operators": stored.operators(), "covered": len(covered), "entropy": entropy})
    return found


def _behavior(dataset: Dataset) -> dict[str, Any] | None:
    """Entropy of the behaviours, for tasks that say what these are."""
    task = next(iter(dataset.tasks.values()), {})
    if len(dataset.tasks) != 1 or not task.get("behaviors"):
        return None
    try:
        return dataset_diversity(dataset)
    except SimtorealError:
        return None  # Recorded without the poses that tell behaviours apart.

"""One self-contained HTML page about a skill: how it was shown, learned, evaluated and driven on a robot.

The page is assembled from the folders that the commands leave behind. Nothing is recomputed except statistics, and
what is missing is left out rather than guessed.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import simtoreal
from simtoreal.data_collection.filters import read_filter
from simtoreal.data_collection.summary import summarize
from simtoreal.envs.errors import CheckpointError, SimtorealError
from simtoreal.envs.html_page import write_page
from simtoreal.envs.provenance import git_commit, machine, versions
from simtoreal.evaluation import film, report_cotraining, report_deployment, report_sections
from simtoreal.evaluation.results import Evaluation, load_evaluation

TEMPLATE = Path(__file__).with_name("report.html")
# What a result is, and its content.
Titled = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ReportSources:
    """Folders that a report is made from; every one of them is optional.

    Attributes:
        dataset: demonstrations.
        demonstration_video: a video of one of them.
        filter: name of a filter of the dataset that the policy learned through.
        runs: label -> training run; the first is the policy that the report is about.
        cotraining: co-training that improved it.
        evaluations: label -> evaluation in simulation; the first is of the policy that the report is about.
        deployments: label -> run on a robot or its twin, in the same order.
        reproduce: command lines that make everything again.
        total_seconds: duration of all stages together.
    """

    dataset: Path | None = None
    demonstration_video: Path | None = None
    filter: str | None = None
    runs: Mapping[str, Path] = field(default_factory=dict)
    cotraining: Path | None = None
    evaluations: Mapping[str, Path] = field(default_factory=dict)
    deployments: Mapping[str, Path] = field(default_factory=dict)
    reproduce: Sequence[str] = ()
    total_seconds: float | None = None


def json_of(folder: Path) -> dict[str, Any]:
    """Return the ``results.json`` of a stage.

    Raises:
        SimtorealError: it is missing or damaged.
    """
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SimtorealError(f"cannot read {path} ({error}); finish the command that writes {folder}") from error
    if not isinstance(content, dict):
        raise SimtorealError(f"{path}: expected an object")
    return content


def read_stage(folder: Path, name: str) -> dict[str, Any]:
    """Return what ``results.json`` says under ``name``, with the provenance beside it.

    Raises:
        SimtorealError: see :func:`json_of`, or there is nothing under that name.
    """
    content = json_of(folder)
    if not isinstance(content.get(name), dict):
        raise SimtorealError(f"{folder / 'results.json'}: key '{name}' is missing; is this the folder of that command?")
    return {**content[name], "provenance": content.get("provenance", {})}


def read_demonstrations(folder: Path) -> dict[str, Any]:
    """Return what is known about how a dataset was collected; of imported or edited ones, what it holds.

    Raises:
        SimtorealError: ``results.json`` or the dataset is damaged.
    """
    if (folder / "results.json").is_file() and "collect" in json_of(folder):
        return read_stage(folder, "collect")
    held = summarize(folder)
    return {
        "task": next(iter(held["tasks"]), ""),
        "episodes": held["episodes"],
        "steps": held["steps"],
        "operators": list(held["operators"]),
    }


def label_folders(folders: Sequence[Path], keys: Sequence[str]) -> dict[str, Path]:
    """Return label -> folder, with the label from each ``results.json``, or the folders' names if those repeat.

    Args:
        folders: stages to label.
        keys: path of the label inside ``results.json``.
    """

    def stored(folder: Path) -> str:
        content: Any = json_of(folder)
        for key in keys:
            content = content.get(key) if isinstance(content, dict) else None
        return str(content or folder.name)

    labels = [stored(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        labels = [str(folder) for folder in folders]
    return dict(zip(labels, folders, strict=True))


def write_report(sources: ReportSources, path: Path) -> Path:
    """Write the page and return its path.

    Raises:
        SimtorealError: there is nothing to report, or a folder that was named cannot be read.
    """
    return write_page(TEMPLATE, build_context(sources), path)


def build_context(sources: ReportSources) -> dict[str, Any]:
    """Return the values of the template's variables.

    Raises:
        SimtorealError: see :func:`write_report`.
    """
    evaluations = [load_evaluation(folder, label) for label, folder in sources.evaluations.items()]
    deployments = [load_evaluation(folder, label) for label, folder in sources.deployments.items()]
    if not (evaluations or deployments or sources.runs or sources.cotraining or sources.dataset):
        raise SimtorealError(
            "a report needs at least one of: a dataset, a training run, a co-training, an evaluation, a deployment"
        )
    if sources.filter and not sources.dataset:
        raise SimtorealError(f"filter '{sources.filter}' is part of a dataset; say which")
    collected = read_demonstrations(sources.dataset) if sources.dataset else None
    kept = read_filter(sources.dataset, sources.filter) if sources.dataset and sources.filter else None
    trained = {label: read_stage(folder, "train") for label, folder in sources.runs.items()}
    practised = json_of(sources.cotraining) if sources.cotraining else None
    practice = report_cotraining.practice(sources.cotraining, practised) if sources.cotraining and practised else None
    videos = _videos(sources, evaluations, deployments)
    pictured = [*videos, *(practice["videos"] if practice else [])]
    task = _task_name(evaluations, deployments, practised, collected)
    # A list: a training and the evaluations of its policy are normally called alike.
    results = [("demonstrations", collected), *((f"training of {label}", run) for label, run in trained.items())]
    results += [("co-training", practised), *((f"evaluation of {arm.label}", arm.results) for arm in evaluations)]
    results += [(f"deployment of {arm.label}", arm.results) for arm in deployments]
    results = [(title, content) for title, content in results if content]
    return {
        "title": f"{task}: from demonstrations to a robot on ROS 2"
        if deployments
        else f"{task}: how well it is learned",
        "subtitle": _subtitle(evaluations, deployments, sources.total_seconds),
        "stages": report_sections.stages(collected, kept, trained, practised, evaluations, deployments, pictured),
        "videos": videos,
        "videos_text": "All in real time. Small pictures are what the policy's cameras delivered, enlarged without "
        "smoothing; the large ones are drawn for you and no policy sees them.",
        "success": report_sections.success(evaluations, deployments),
        "progress": report_sections.progress(evaluations, deployments),
        "kept": report_sections.kept_demonstrations(kept),
        "learning": report_sections.learning(sources.runs, trained),
        "practice": practice,
        "deployment": report_deployment.deployment(deployments),
        "notes": report_sections.notes(evaluations, deployments, trained, practised),
        "reproduce_text": "The whole page is made again by the commands below; seeds are fixed.",
        "reproduce": list(sources.reproduce) or _commands(results),
        "details": _details(sources.runs, results),
        "version": simtoreal.__version__,
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _task_name(evaluations: list[Evaluation], deployments: list[Evaluation], *others: Mapping[str, Any] | None) -> str:
    for content in [*(arm.results for arm in [*evaluations, *deployments]), *others]:
        if content and content.get("task"):
            name = str(content["task"]).replace("_", " ")
            return name[:1].upper() + name[1:]
    return "Skill"


def _subtitle(evaluations: list[Evaluation], deployments: list[Evaluation], seconds: float | None) -> str:
    episode = next((e for arm in [*evaluations, *deployments] for e in arm.episodes if e.instruction), None)
    task = f"“{episode.instruction}”, learned" if episode else "Learned"
    foreign = any(arm.backend == "gymnasium" for arm in evaluations)
    inputs = "the observations that were recorded" if foreign else "camera images and joint readings only"
    parts = [f"{task} from {inputs}, and judged by the task's own success test."]
    if seconds:
        parts.append(f"Everything on this page took {report_sections.minutes(seconds)} on {machine()['cores']} cores.")
    return " ".join(parts)


def _videos(
    sources: ReportSources, evaluations: list[Evaluation], deployments: list[Evaluation]
) -> list[dict[str, Any]]:
    """Return what the template's ``player`` needs, plus the file each video came from."""
    found: list[dict[str, Any]] = []

    def add(kind: str, path: Path, title: str, caption: str, badge: str = "", good: bool = True) -> None:
        found.append(
            {
                "kind": kind,
                "path": path,
                "title": title,
                "caption": caption,
                "badge": badge,
                "badge_kind": "good" if good else "bad",
                "data": film.embed(path),
            }
        )

    if sources.demonstration_video:
        add("demonstration", sources.demonstration_video, "Demonstration", "by the scripted expert")
    for arm in [*evaluations[:1], *deployments]:
        world = f"{arm.backend}, over ROS 2" if arm in deployments else "simulation"
        for success, badge in ((True, "success"), (False, "failure")):
            video = next((v for v in arm.results.get("videos", []) if v["success"] is success), None)
            if video:
                add(
                    arm.backend, arm.folder / video["file"], arm.label, f"{world}, seed {video['seed']}", badge, success
                )
    return found


def _commands(results: Sequence[Titled]) -> list[str]:
    commands = [str(content.get("provenance", {}).get("command", "")) for _, content in results]
    return [command.replace("__main__.py", "simtoreal", 1) for command in dict.fromkeys(commands) if command]


def _details(runs: Mapping[str, Path], results: Sequence[Titled]) -> list[dict[str, Any]]:
    from simtoreal.policies.checkpoint import CONFIG, find_checkpoint

    blocks: list[dict[str, Any]] = []
    for label, folder in runs.items():
        try:
            config = find_checkpoint(folder) / CONFIG
        except CheckpointError:
            continue  # Trained, but its checkpoints are gone: the report has the rest to say.
        blocks.append({"title": f"Configuration of {label}", "table": None, "text": config.read_text(encoding="utf-8")})
    rows = [[name, version] for name, version in versions().items()]
    hardware = machine()
    rows += [["processor", f"{hardware['cpu']}, {hardware['cores']} cores"], ["system", hardware["system"]]]
    blocks.append(
        {"title": "Versions and machine", "text": "", "table": {"columns": ["what", "version"], "rows": rows}}
    )
    commits = [[title, _commits(content)] for title, content in results]
    if rows := [row for row in commits if row[1]]:
        table = {"columns": ["result", "commit"], "rows": rows}
        blocks.append({"title": "Source of every result", "text": "", "table": table})
    return blocks


def _commits(content: Mapping[str, Any]) -> str:
    """Return the commits that made a result; an evaluation may have been continued by another one."""
    sources = content.get("sessions") or [content.get("provenance", {})]
    return ", ".join(dict.fromkeys(str(source["commit"]) for source in sources if source.get("commit")))

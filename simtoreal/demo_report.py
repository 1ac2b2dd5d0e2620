"""What a demo makes of its finished stages: the page, ``results.json``, and the rows of the summary in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simtoreal.demo_stages import FILTER, GAP

if TYPE_CHECKING:
    from simtoreal.commands.demo import Config
    from simtoreal.pipeline import StageRecord

_RATE = ("success_rate", "successes", "n", "interval")
BEFORE, AFTER = "base policy", "improved policy"


def write_demo_report(config: Config, seconds: float) -> Path:
    """Write ``report.html`` and the picture ``overview.jpg`` into the demo's folder; return the page.

    Args:
        config: of a demo whose stages are finished.
        seconds: that all of them took.
    """
    from simtoreal.evaluation.film import film_strip, write_picture
    from simtoreal.evaluation.outside import write_demonstration
    from simtoreal.evaluation.report import ReportSources, write_report

    output = config.folder
    video = write_demonstration(output / "demonstrations", output / "demonstration.mp4")
    shown = _full_videos(output) if config.full else _short_videos(output)
    write_picture(output / "overview.jpg", film_strip({"demonstration": video, **shown}))
    sources: dict[str, Any] = _full_sources(output) if config.full else _short_sources(output)
    full = " --full" if config.full else ""
    return write_report(
        ReportSources(
            **sources,
            demonstration_video=video,
            reproduce=[
                f"simtoreal demo{full} --profile {config.profile} --task {config.task} --seed {config.seed}",
            ],
            total_seconds=seconds,
        ),
        output / "report.html",
    )


def _short_sources(output: Path) -> dict[str, Any]:
    return {
        "dataset": output / "demonstrations",
        "runs": {"diffusion": output / "policy", "bc": output / "baseline"},
        "evaluations": {"diffusion": output / "simulation", "bc": output / "baseline_simulation"},
        "deployments": {"diffusion": output / "robot"},
    }


def _full_sources(output: Path) -> dict[str, Any]:
    base, final = measured_folders(output / "cotrain")
    return {
        "dataset": output / "merged",
        "filter": FILTER,
        "runs": {"diffusion": output / "policy"},
        "cotraining": output / "cotrain",
        "evaluations": {AFTER: final, BEFORE: base},
        "deployments": {AFTER: output / "robot_after", BEFORE: output / "robot_before"},
    }


def measured_folders(cotraining: Path) -> tuple[Path, Path]:
    """Return the evaluations, in the world that counts, of the policies before and after a finished co-training."""
    from simtoreal.evaluation.report import json_of
    from simtoreal.world_models.cotrain_measurement import MEASUREMENTS
    from simtoreal.world_models.cotrain_stages import REAL

    points = json_of(cotraining)["measurements"]
    base, final = (cotraining / MEASUREMENTS / points[index]["policy"] / REAL for index in (0, -1))
    return base, final


def _short_videos(output: Path) -> dict[str, Path]:
    return {
        **_first_video("policy in simulation", output / "simulation"),
        **_first_video(f"policy on the '{GAP}' twin over ROS 2", output / "robot"),
    }


def _full_videos(output: Path) -> dict[str, Path]:
    from simtoreal.evaluation.report import json_of

    imagined = json_of(output / "cotrain")["videos"][-1]
    return {
        **_first_video(f"{BEFORE}, on the '{GAP}' twin", output / "robot_before"),
        "real and imagined": output / "cotrain" / imagined,
        **_first_video(f"{AFTER}, on the '{GAP}' twin", output / "robot_after"),
    }


def _first_video(title: str, folder: Path) -> dict[str, Path]:
    from simtoreal.evaluation.report import json_of

    videos = json_of(folder)["videos"]
    return {f"{title}: {'success' if v['success'] else 'failure'}": folder / v["file"] for v in videos[:1]}


def demo_results(config: Config, records: Sequence[StageRecord], report: Path) -> dict[str, Any]:
    """Return the content of the demo's ``results.json``."""
    from simtoreal.envs.provenance import provenance

    stages = _full_results(config.folder) if config.full else _short_results(config.folder)
    return {
        "profile": config.profile,
        "task": config.task,
        **stages,
        "report": str(report),
        "seconds": sum(record.seconds for record in records),
        "stages": {record.stage.name: record.seconds for record in records},
        "provenance": provenance([config.seed]),
    }


def _short_results(output: Path) -> dict[str, Any]:
    from simtoreal.evaluation.report import read_stage

    baseline = read_stage(output / "baseline", "train")
    return {
        "collect": _collected(output / "demonstrations"),
        "train": _trained(output / "policy"),
        "sim": _rate(output / "simulation"),
        "baseline": {**_rate(output / "baseline_simulation"), "policy": "bc", "train_seconds": baseline["seconds"]},
        "robot": _deployed(output / "robot"),
    }


def _full_results(output: Path) -> dict[str, Any]:
    from simtoreal.data_collection.filters import read_filter
    from simtoreal.evaluation.compare import compare
    from simtoreal.evaluation.report import json_of
    from simtoreal.evaluation.results import load_evaluation

    cotrained = json_of(output / "cotrain")
    gap = next(point for point in reversed(cotrained["measurements"]) if "gap" in point)
    robots = [load_evaluation(output / f"robot_{when}", when) for when in ("before", "after")]
    return {
        "collect": {name: _collected(output / name) for name in ("demonstrations", "second_operator", "still")},
        "filter": read_filter(output / "merged", FILTER).operators(),
        "train": _trained(output / "policy"),
        "cotrain": {
            **{key: cotrained[key] for key in ("base", "final", "comparison", "real_episodes", "real_steps")},
            **{key: gap[key] for key in ("imagined", "gap", "gap_interval", "agreement")},
        },
        "robot_before": _deployed(output / "robot_before"),
        "robot_after": _deployed(output / "robot_after"),
        "robot_comparison": compare(robots)["pairs"][0],
    }


def _collected(folder: Path) -> dict[str, Any]:
    from simtoreal.evaluation.report import read_stage

    content = read_stage(folder, "collect")
    return {key: content[key] for key in ("episodes", "episodes_per_s", "success_rate", "interval")}


def _trained(folder: Path) -> dict[str, Any]:
    from simtoreal.evaluation.report import read_stage

    content = read_stage(folder, "train")
    return {key: content[key] for key in ("policy", "seconds", "steps", "parameters")}


def _rate(folder: Path) -> dict[str, Any]:
    from simtoreal.evaluation.report import json_of

    content = json_of(folder)
    return {key: content[key] for key in _RATE}


def _deployed(folder: Path) -> dict[str, Any]:
    from simtoreal.evaluation.report import json_of

    content = json_of(folder)
    return {**_rate(folder), **{key: content[key] for key in ("gap", "missed_periods", "p99_period_error_ms")}}


def summary_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the terminal shows of a demo's ``results.json``."""
    from simtoreal.evaluation.statistics import format_rate
    from simtoreal.pipeline import format_duration

    def rate(content: Mapping[str, Any]) -> str:
        return format_rate(content["successes"], content["n"])

    train = results["train"]
    training = "training", f"{train['parameters'] / 1e6:.1f} M parameters, {format_duration(train['seconds'])}"
    if "cotrain" not in results:
        collected, robot = results["collect"], results["robot"]
        speed = collected["episodes_per_s"]
        return [
            ("demonstrations", f"{collected['episodes']}" + (f" at {speed:.1f} episodes/s" if speed else "")),
            training,
            ("policy in simulation", rate(results["sim"])),
            ("baseline in simulation", rate(results["baseline"])),
            (f"policy on the '{GAP}' twin", rate(robot)),
            ("control loop", _punctuality([robot])),
        ]
    cotrained, robots = results["cotrain"], [results["robot_before"], results["robot_after"]]
    low, high = cotrained["gap_interval"]
    return [
        *(
            (f"operator {row['operator']}", f"{row['accepted']} of {row['episodes']} demonstrations accepted")
            for row in results["filter"]
        ),
        training,
        (f"{BEFORE} in simulation with that gap", rate(cotrained["base"])),
        (f"{AFTER} in simulation with that gap", rate(cotrained["final"])),
        ("imagined - real success", f"{100 * cotrained['gap']:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}]"),
        *((f"{who} on the '{GAP}' twin", rate(robot)) for who, robot in zip((BEFORE, AFTER), robots, strict=True)),
        ("real episodes learned from", f"{cotrained['real_episodes']} ({cotrained['real_steps']} steps)"),
        ("control loop", _punctuality(robots)),
    ]


def _punctuality(robots: Sequence[Mapping[str, Any]]) -> str:
    missed = sum(robot["missed_periods"] for robot in robots)
    return f"{missed} missed periods, p99 error {max(robot['p99_period_error_ms'] for robot in robots):.2f} ms"

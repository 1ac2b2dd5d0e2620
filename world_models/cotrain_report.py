"""What a co-training leaves behind: results.json, a plot of real and learned-in success, and a link to the policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import provenance
from simtoreal.evaluation.compare import compare
from simtoreal.evaluation.plots import practice_plot, save_png
from simtoreal.evaluation.results import load_evaluation
from simtoreal.policies.training_log import read_metrics
from simtoreal.world_models.cotrain_measurement import Measurements
from simtoreal.world_models.cotrain_stages import REAL, Stages

RESULTS, PLOT, POLICY = "results.json", "success.png", "policy"
# Values of an iteration that the results keep; everything else is in metrics.jsonl of the run.
_KEPT = (
    "success", "success_from_beginnings", "success_from_keyframes", "rollouts", "rollouts_from_keyframes",
    "dropped_rollouts", "control_steps", "divergence", "anchor_loss",
)  # fmt: skip


def write_report(
    stages: Stages, settings: Mapping[str, Any], measurements: Measurements, *, base: str, final: str, policy: Path
) -> dict[str, Any]:
    """Write ``results.json`` and ``success.png``, let ``policy`` point to the final policy, and return the results.

    Args:
        stages: all of them finished.
        settings: of the co-training.
        measurements: where the evaluations lie.
        base, final: names of the measurements of the first and the last policy.
        policy: folder of the final policy.
    """
    output = stages.output
    arms = [
        load_evaluation(measurements.folder(name, REAL), label) for name, label in ((base, "base"), (final, "final"))
    ]
    compared = compare(arms) if base != final else None
    points = [record["measurement"] for record in stages.records if "measurement" in record]
    iterations = _iterations(stages)
    results = {
        "kind": "cotrain",
        "method": settings["method"],
        "task": settings["task"],
        "policy": POLICY,
        **{
            label: {key: arm.results[key] for key in ("success_rate", "successes", "n", "interval")}
            for label, arm in zip(("base", "final"), arms, strict=True)
        },
        "comparison": compared["pairs"][0] if compared else None,
        "measurements": points,
        "calibrations": [record["calibration"] for record in stages.records if "calibration" in record],
        "rankings": [record["ranking"] for record in stages.records if "ranking" in record],
        "iterations": iterations,
        **stages.real_so_far(),
        "ledger": stages.ledger(),
        "dropped_rollouts": sum(record.get("dropped_rollouts", 0) for record in stages.records),
        "videos": [path for record in stages.records for path in record.get("videos", ())],
        "seconds": sum(record["seconds"] for record in stages.records),
        "stages": {record["name"]: record["seconds"] for record in stages.records},
        "settings": dict(settings),
        "provenance": provenance([settings["seed"]]),
    }
    write_json(output / RESULTS, results)
    save_png(practice_plot(points, iterations), output / PLOT)
    _link(output / POLICY, policy)
    return results


def _iterations(stages: Stages) -> list[dict[str, Any]]:
    """Metrics of every iteration of reinforcement."""
    runs = dict.fromkeys(record["run"] for record in stages.records if "run" in record)
    return [
        {"iteration": line["step"], **{key: line[key] for key in _KEPT if key in line}}
        for run in runs
        for line in read_metrics(stages.output / run)
    ]


def _link(link: Path, target: Path) -> None:
    """Let ``link`` point to a folder, atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    os.replace(temporary, link)

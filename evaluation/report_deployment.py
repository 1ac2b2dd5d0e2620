"""The section of the report about the robot or its twin: how punctual the control loop was, what the twin changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from simtoreal.envs.figures import to_svg
from simtoreal.envs.randomization import RANDOMIZATIONS
from simtoreal.evaluation import plots
from simtoreal.evaluation.results import Evaluation

# Key in a deployment's results.json -> text and unit.
TIMING = {
    "periods": ("control periods", ""),
    "missed_periods": ("missed periods", ""),
    "p50_period_error_ms": ("period error, median", "ms"),
    "p99_period_error_ms": ("period error, 99th percentile", "ms"),
    "max_period_error_ms": ("period error, largest", "ms"),
    "inference_p50_ms": ("inference, median", "ms"),
    "inference_p99_ms": ("inference, 99th percentile", "ms"),
    "executed_chunk_ms": ("executed part of a chunk", "ms"),
    "starved_steps": ("steps without a fresh action", ""),
}


def deployment(deployed: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Return how punctual the control loops were, and what the twin changed; None without a deployment."""
    if not deployed:
        return None
    first, several = deployed[0], len(deployed) > 1
    rows = [[text, *(_measured(arm, key, unit) for arm in deployed)] for key, (text, unit) in TIMING.items()]
    gates = [arm.results.get("gate", {}) for arm in deployed]
    speeds = [f"{gate['publish_hz']:.0f} Hz" if "publish_hz" in gate else "" for gate in gates]
    slowed = [f"{gate['limited']:,} of {gate['published']:,}" if "publish_hz" in gate else "" for gate in gates]
    rows += [["targets published by the safety gate", *speeds], ["targets that the gate slowed down", *slowed]]
    rows = [[title, *(cell or "-" for cell in cells)] for title, *cells in rows if any(cells)]
    loops = {arm.label if several else "control loop": arm.results for arm in deployed}
    if not several:
        loops["safety gate"] = gates[0].get("timing", {})
    loops = {title: loop for title, loop in loops.items() if "period_error_histogram" in loop}
    changes = _gap_changes(first.results.get("gap"))
    titles = [arm.label for arm in deployed] if several else ["measured"]
    worlds = " and the ".join(dict.fromkeys(arm.world for arm in deployed))
    who = "One after the other, the policies" if several else "The policy"
    return {
        "text": f"{who} drove the {worlds} over ROS 2 topics in real time. Control loop, inference, "
        "safety gate and robot are processes of their own, and the gate stands between policy and robot."
        + (" The histograms are those of the control loops." if several else ""),
        "svg": to_svg(plots.timing_plot(loops)) if loops else "",
        "timing": {
            "columns": ["real time", *titles],
            "rows": rows,
        },
        "gap": {"columns": [f"what the {first.world} changes", "by"], "rows": changes} if changes else None,
    }


def _measured(arm: Evaluation, key: str, unit: str) -> str:
    return f"{arm.results[key]:.4g} {unit}" if key in arm.results else ""


def _gap_changes(gap: str | None) -> list[list[str]]:
    """Return the ranges of a reality gap that differ from the training simulation."""
    if gap not in RANDOMIZATIONS:
        return []
    nominal, changed = (dataclasses.asdict(RANDOMIZATIONS[name]) for name in ("none", gap))
    rows = []
    for key, value in changed.items():
        if value != nominal[key]:
            low, high = value if isinstance(value, tuple) else (value, value)
            shown = f"{low:g} to {high:g}" if low != high else f"{high:g}"
            rows.append([key.replace("_", " "), shown])
    return rows

"""The section of the report about a policy that improved by reinforcement in imagination, or in a simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simtoreal.envs.errors import SimtorealError
from simtoreal.envs.figures import to_svg
from simtoreal.evaluation import film, plots
from simtoreal.evaluation.report_sections import percent, points, rate

# Where a policy learned, besides the world that counts: key of a measurement -> how the page says it.
PRACTICE = {"imagined": "imagination", "simulation": "simulation"}
PURPOSES = {
    "demonstrations": "demonstrations",
    "learning": "rollouts that something was learned from",
    "evaluation": "evaluation only",
}


def practice(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page says about a co-training.

    Args:
        folder: of the co-training.
        content: its ``results.json``.

    Raises:
        SimtorealError: that is no co-training, or a video is gone.
    """
    if content.get("kind") != "cotrain":
        raise SimtorealError(f"{folder / 'results.json'}: is not from 'simtoreal cotrain'")
    compared = [point for point in content["measurements"] if "gap" in point]
    other = next((name for name in PRACTICE if any(name in point for point in compared)), "imagined")
    return {
        "title": f"How it practised in {PRACTICE[other]}",
        "text": _text(content, other),
        "svg": to_svg(plots.practice_plot(content["measurements"], content["iterations"])),
        "table": _comparison(content["measurements"], other),
        "verdict": _verdict(content),
        "ledger": _ledger(content["ledger"]),
        "videos": [
            {
                "kind": "practice",
                "path": folder / file,
                "badge": "",
                "title": f"Real and {other}, round {number}",
                "caption": "the improved policy from the same first frames in both worlds, one column each",
                "data": film.embed(folder / file),
            }
            for number, file in enumerate(content["videos"], start=1)
        ],
    }


def _text(content: Mapping[str, Any], other: str) -> str:
    gap = content["settings"]["real"].get("randomization", "none")
    stand_in = "the simulation" if gap == "none" else f"the simulation with the '{gap}' gap"
    imagined = other == "imagined" and content["iterations"]
    model = " A video world model imagined the rollouts." if imagined else ""
    imitated = ""
    if content["settings"].get("wovr", {}).get("imitation_rollouts"):
        imitated = " First, a policy was trained anew on the demonstrations and the base policy's real successes."
    ranked = [one for one in content.get("rankings", ()) if one["same_start"] is not None]
    if ranked:
        shares = " and ".join(f"{100 * one['same_start']:.0f} %" for one in ranked)
        imitated += (
            f" Of a success and a failure from the same start, the model told which is which in {shares} of the pairs "
            "before the policy practised in it (chance: 50 %)."
        )
    return (
        f"{len(content['iterations'])} iterations of reinforcement.{model}{imitated} “Real” is {stand_in}, which "
        "stands in for the robot and alone decides what succeeded. A measurement runs the same policy with the same "
        "noise from the same first frames in both worlds; the difference is what only works where the policy practises."
    )


def _comparison(measurements: Sequence[Mapping[str, Any]], other: str) -> dict[str, Any]:
    """Every policy as often as it was measured in both worlds, or once."""
    rows = []
    compared = {point["policy"] for point in measurements if "gap" in point}
    for point in measurements:
        if "gap" not in point:
            if point["policy"] not in compared:
                policy, iteration = str(point["policy"]), str(point["iteration"])
                rows.append([policy, "-", iteration, rate(point["real"]), "-", "-", "-"])
            continue
        low, high = point["gap_interval"]
        rows.append(
            [
                str(point["policy"]),
                str(point.get("world_model", "-")),
                str(point["iteration"]),
                rate(point["real"]),
                rate(point[other]),
                f"{points(point['gap'])} ({points(low)} to {points(high)})",
                percent(point["agreement"]),
            ]
        )
    columns = ["policy", "world model", "iteration", "real", other, f"{other} - real, points", "same outcome"]
    return {"columns": columns, "rows": rows, "text_columns": 2}


def _verdict(content: Mapping[str, Any]) -> str:
    before, after = (f"{percent(content[key]['success_rate'])} ({rate(content[key])})" for key in ("base", "final"))
    learned = (
        f"Learned from {content['real_episodes']:,} real episodes of {content['real_steps']:,} control steps, the "
        "demonstrations included."
    )
    pair = content["comparison"]
    if pair is None:
        return f"Real success {after}. {learned}"
    low, high = pair["difference_interval"]
    return (
        f"Real success went from {before} to {after}: {points(pair['difference'])} percentage points (95 % interval "
        f"{points(low)} to {points(high)}; p = {pair['p_value']:.2g}, same initial conditions). {learned}"
    )


def _ledger(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the stages up: what was done in which world, and what for."""
    rows = []
    for world in dict.fromkeys(entry["world"] for entry in entries):
        for purpose, text in PURPOSES.items():
            chosen = [entry for entry in entries if (entry["world"], entry["purpose"]) == (world, purpose)]
            episodes, steps = (sum(entry[key] for entry in chosen) for key in ("episodes", "steps"))
            if episodes:
                rows.append([world, text, f"{episodes:,}", f"{steps:,}"])
    return {"columns": ["world", "what for", "episodes", "control steps"], "rows": rows, "text_columns": 2}

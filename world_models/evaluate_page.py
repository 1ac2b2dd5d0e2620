"""The results of an evaluation as one self-contained HTML page, and its plots as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import simtoreal
from simtoreal.envs import html_page
from simtoreal.envs.figures import to_svg
from simtoreal.evaluation.film import embed
from simtoreal.evaluation.plots import save_png
from simtoreal.evaluation.statistics import format_rate
from simtoreal.world_models.evaluate_plots import all_plots

TEMPLATE = Path(__file__).with_name("evaluate.html")
PAGE = "evaluate.html"
RULES = {
    "vanishes": "an object vanishes",
    "duplicates": "an object appears twice",
    "moves": "an object moves although nothing touches it",
}


def write_page(results: Mapping[str, Any], output: Path) -> Path:
    """Write ``evaluate.html`` and ``plots/*.png`` into the folder that holds ``results.json`` and the videos.

    Raises:
        SimtorealError: a video is missing.
    """
    figures = all_plots(results)
    for name, figure in figures.items():
        save_png(figure, output / "plots" / f"{name}.png")
    provenance = results["provenance"]
    context = {
        "subtitle": f"{results['model']}, judged on {results['episodes']['judged']} episodes of "
        f"{', '.join(results['data'])} that it did not learn from",
        "tiles": tiles(results),
        "warnings": results["warnings"],
        "videos": [{"data": embed(output / video["file"]), "text": _caption(video)} for video in results["videos"]],
        "plots": {name: to_svg(figure) for name, figure in figures.items()},
        "position_plots": [name for name in figures if name.startswith("position_")],
        "positions": position_rows(results),
        "gap_steps": results["actions"]["gap_steps"],
        "actions": action_table(results["actions"]),
        "classifier": classifier_rows(results["classifier"]),
        "violations": [
            [RULES[rule], *(format_rate(rates[name]["episodes"], rates[name]["n"]) for name in ("imagined", "real"))]
            for rule, rates in (results["violations"] or {}).items()
        ],
        "policies": policy_section(results.get("policies")),
        "notes": results["notes"],
        "footer": f"simtoreal {simtoreal.__version__}, commit {provenance.get('commit')}, seeds "
        f"{provenance.get('seeds')}",
    }
    return html_page.write_page(TEMPLATE, context, output / PAGE)


def _caption(video: Mapping[str, Any]) -> str:
    broken = "".join(f"; flagged: {RULES[rule]}" for rule in video["violations"])
    return f"{video['episode']}, really a {'success' if video['success'] else 'failure'}{broken}"


def number(entry: Mapping[str, Any] | None, scale: float = 1.0, digits: int = 1, unit: str = "") -> str:
    """Return e.g. ``"12.3 (11.0 to 13.9) mm"`` of an entry with ``mean`` and ``interval``."""
    if entry is None or entry["mean"] is None:
        return "-"
    text = f"{scale * entry['mean']:.{digits}f}"
    if entry["interval"]:
        low, high = (scale * value for value in entry["interval"])
        text += f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{text} {unit}".rstrip()


def tiles(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the numbers at the top of the page."""
    found = [
        {"value": str(results["episodes"]["longest"]), "label": "control steps imagined at most, from one real frame"},
        {"value": number({**results["psnr_db"], "interval": None}, unit="dB"), "label": "PSNR, mean over the episode"},
    ]
    for name, entry in (results["positions"] or {}).items():
        moved = entry.get("imagined_moved")
        floor = entry["floor_moved"] if moved else entry["floor"]
        found.append(
            {
                "value": number({**(moved or entry["imagined"]), "interval": None}, 1000, unit="mm"),
                "label": f"error of {name}{', where it moves' if moved else ''} (floor "
                f"{number({**floor, 'interval': None}, 1000, unit='mm')})",
            }
        )
    following = results["actions"]["imagined"]["following"]
    if following is not None:
        found.append({"value": f"{100 * following:.0f} %", "label": "of what real videos show of their actions"})
    policies = results.get("policies")
    if policies and policies["pearson_r"] is not None:
        label = f"correlation with success in the simulator, {policies['policies']} policies"
        found.append({"value": f"{policies['pearson_r']:.2f}", "label": label})
    return found


def position_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of text per thing whose position is known."""
    rows = []
    for name, entry in (results["positions"] or {}).items():
        for suffix, text in (("", ""), ("_moved", ", episodes in which it moves")):
            if entry.get(f"imagined{suffix}"):
                kinds = ("imagined", "reconstructed", "floor")
                cells = [number(entry[f"{kind}{suffix}"], 1000, unit="mm") for kind in kinds]
                rows.append([f"{name}{text}", *cells, str(entry[f"imagined{suffix}"]["n"])])
    return rows


def action_table(actions: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns and rows of the table of action following."""
    names = [name for name in ("real", "imagined", "swapped") if name in actions]
    rows = [
        [dimension, *(_r2(actions[name]["r2"][dimension]) for name in names)] for dimension in actions["real"]["r2"]
    ]
    accuracies = [actions[name]["gripper_accuracy"] for name in names]
    if any(value is not None for value in accuracies):
        texts = ["-" if value is None else f"{100 * value:.0f} %" for value in accuracies]
        rows.append(["gripper: open or closed is read right", *texts])
    shares = [actions[name]["following"] for name in names]
    rows.append(["together, relative to real", *("-" if v is None else f"{100 * v:.0f} %" for v in shares)])
    return {"columns": ["action", *names], "rows": rows}


def _r2(score: Mapping[str, Any]) -> str:
    return number({"mean": score["r2"], "interval": score["interval"]}, digits=2)


def classifier_rows(classifier: Mapping[str, Any]) -> list[list[str]]:
    """Return one row of text per kind of video and of unit."""
    rows = []
    for name in ("real", "imagined"):
        for unit in ("episodes", "frames"):
            counts = classifier[name][unit]
            keys = ("true_positives", "false_positives", "false_negatives", "true_negatives")
            accuracy = counts["balanced_accuracy"]
            text = "-" if accuracy is None else f"{100 * accuracy:.0f} %"
            rows.append([f"{name} {unit}", *(f"{counts[key]:,}" for key in keys), text])
    return rows


def policy_section(policies: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return text and rows about the evaluation of policies."""
    if not policies:
        return None

    def value(name: str, scale: float = 1.0, digits: int = 2) -> str:
        return number({"mean": policies[name], "interval": policies[f"{name}_interval"]}, scale, digits)

    correlation = "is not defined" if policies["pearson_r"] is None else value("pearson_r")
    text = (
        f"{policies['policies']} policies from the same {policies['n']} initial conditions in both. Pearson's r "
        f"{correlation}; mean bias (model minus simulator) {value('mean_bias', 100, 1)} percentage points; mean "
        f"maximum rank violation {value('mmrv')}; {value('agreement', 100, 0)} % of single outcomes agree. "
        "Intervals: 95 %, bootstrap over initial conditions."
    )
    rows = []
    for row in policies["rows"]:
        worlds = [row[world] for world in ("simulation", "imagined")]
        difference = 100 * (worlds[1]["success_rate"] - worlds[0]["success_rate"])
        rates = [format_rate(world["successes"], world["n"]) for world in worlds]
        rows.append([f"{row['label']} ({row['path']})", *rates, f"{difference:+.0f} (p = {row['p_value']:.2g})"])
    return {"text": text, "rows": rows}

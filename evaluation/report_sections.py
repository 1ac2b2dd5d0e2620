"""The sections of the report, each from what a stage left on disk; None where there is nothing to show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simtoreal.envs.figures import to_svg
from simtoreal.envs.randomization import RANDOMIZATIONS
from simtoreal.evaluation import film, plots
from simtoreal.evaluation.compare import NOT_DISTINGUISHABLE, compare
from simtoreal.evaluation.results import Evaluation, EvaluationError
from simtoreal.policies.training_log import read_metrics

Points = list[tuple[float, float]]


def percent(value: float) -> str:
    """Return e.g. ``"93 %"``."""
    return f"{100 * value:.0f} %"


def rate(content: Mapping[str, Any]) -> str:
    """Return e.g. ``"93/100, 95 % interval 86-97 %"`` of a result with ``successes``, ``n`` and ``interval``."""
    low, high = content["interval"]
    return f"{content['successes']}/{content['n']}, 95 % interval {100 * low:.0f}-{100 * high:.0f} %"


def points(difference: float) -> str:
    """Return a difference of rates as signed percentage points, e.g. ``"+12"``."""
    return f"{round(100 * difference):+d}"


def minutes(seconds: float) -> str:
    """Return e.g. ``"7.7 min"``, or seconds below two minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def stages(
    collected: Mapping[str, Any] | None,
    trained: Mapping[str, Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    deployment: Evaluation | None,
    videos: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the cards of the pipeline picture."""
    cards: list[dict[str, Any]] = []

    def add(step: str, headline: str, detail: str, *kinds: str, moment: float) -> None:
        video = next((v for kind in kinds for v in videos if v["kind"] == kind), None)
        picture = film.thumbnail(video["path"], moment) if video else None
        cards.append({"step": step, "headline": headline, "detail": detail, "picture": picture, "svg": None})

    if collected:
        speed = collected.get("episodes_per_s")
        who = ", ".join(collected["operators"][:3]) if collected.get("operators") else "a scripted expert"
        detail = f"by {who}" + (f", {speed:.0f} episodes/s" if speed else "")
        add("1 Demonstrate", f"{collected.get('episodes', '?')} episodes", detail, "demonstration", moment=0.3)
    if trained:
        label, run = next(iter(trained.items()))
        parts = [f"{run['parameters'] / 1e6:.1f} M parameters" if run.get("parameters") else ""]
        parts.append(f"{run['steps']:,} steps" if run.get("steps") else "")
        detail = f"to train {label}: " + ", ".join(part for part in parts if part)
        headline = minutes(run["seconds"]) if run.get("seconds") else label
        add(f"{len(cards) + 1} Learn", headline, detail, "demonstration", "simulation", moment=0.6)
    if evaluations:
        main, *others = evaluations
        detail = f"success in simulation ({rate(main.results)})"
        detail += "".join(
            f"; {arm.label} {percent(arm.results['success_rate'])} ({rate(arm.results)})" for arm in others
        )
        add(f"{len(cards) + 1} Evaluate", percent(main.results["success_rate"]), detail, "simulation", moment=0.75)
    if deployment:
        detail = f"success on the {world(deployment)} ({rate(deployment.results)})"
        headline = percent(deployment.results["success_rate"])
        add(f"{len(cards) + 1} Deploy", headline, detail, deployment.backend, moment=0.9)
    return cards


def world(arm: Evaluation) -> str:
    """Return where an evaluation took place, e.g. ``"'standard' twin"``."""
    gap = arm.results.get("gap")
    return f"'{gap}' {arm.backend}" if gap else arm.backend


def success(evaluations: Sequence[Evaluation], deployment: Evaluation | None) -> dict[str, Any] | None:
    """Return plot, table and verdicts of all success rates."""
    arms = [*evaluations, *([deployment] if deployment else [])]
    if not arms:
        return None
    rows, drawn = [], []
    for arm in arms:
        low, high = arm.results["interval"]
        time = arm.results.get("time_to_success_s")
        label = f"{arm.label}, {world(arm)}"
        rows.append(
            [
                label,
                percent(arm.results["success_rate"]),
                str(arm.results["n"]),
                f"{100 * low:.0f}-{100 * high:.0f} %",
                f"{time['median']:.1f} s" if time else "-",
            ]
        )
        drawn.append(
            {**{key: arm.results[key] for key in ("successes", "n", "success_rate", "interval")}, "label": label}
        )
    verdicts = [_verdict(evaluations[0], other) for other in evaluations[1:]]
    if deployment and evaluations:
        verdicts.append(_gap(evaluations[0], deployment))
    checked = evaluations and not any(arm.results.get("notes") for arm in arms)
    return {
        "text": "Every rate has its number of episodes and a 95 % interval (Beta posterior under a uniform prior)."
        + (" No initial condition of these episodes was demonstrated." if checked else ""),
        "svg": to_svg(plots.success_plot(drawn)),
        "table": {"columns": ["policy, world", "success", "episodes", "95 % interval", "median time"], "rows": rows},
        "verdicts": verdicts,
    }


def _verdict(first: Evaluation, second: Evaluation) -> str:
    try:
        result = compare([first, second])
    except EvaluationError:
        result = compare([first, second], paired=False)
    (pair,) = result["pairs"]
    low, high = pair["difference_interval"]
    test = f"{result['test']}, p = {pair['p_value']:.2g}, {first.results['n']} and {second.results['n']} episodes"
    interval = f"95 % interval {points(-high)} to {points(-low)}"
    difference = f"{points(-pair['difference'])} percentage points ({interval})"
    if pair["verdict"] == NOT_DISTINGUISHABLE:
        return (
            f"{first.label} and {second.label} are not distinguishable in simulation: {difference}; {test}. "
            "More episodes would be needed to tell them apart."
        )
    return f"{pair['verdict']} in simulation: {first.label} minus {second.label} is {difference}; {test}."


def _gap(simulated: Evaluation, deployed: Evaluation) -> str:
    result = compare([simulated, deployed], paired=False)
    (pair,) = result["pairs"]
    low, high = pair["difference_interval"]
    known = "is" if pair["verdict"] != NOT_DISTINGUISHABLE else "cannot be told from zero at this n, it is"
    return (
        f"The gap from simulation to the {world(deployed)} {known} {points(pair['difference'])} percentage "
        f"points (95 % interval {points(low)} to {points(high)}; Barnard's exact test, p = {pair['p_value']:.2g})."
    )


def progress(evaluations: Sequence[Evaluation], deployment: Evaluation | None) -> dict[str, Any] | None:
    """Return how far episodes get and how they fail."""
    arms = [*evaluations, *([deployment] if deployment else [])]
    names = list(dict.fromkeys(name for arm in arms for name in arm.results.get("milestones", {})))
    if not names:
        return None
    titles = [f"{arm.label}, {world(arm)}" for arm in arms]
    reached = []
    for name in names:
        found = [arm.results.get("milestones", {}).get(name) for arm in arms]
        reached.append(
            [name, *(f"{percent(m['success_rate'])} ({m['successes']}/{m['n']})" if m else "-" for m in found)]
        )
    failures = [
        [title, tag, str(count)]
        for title, arm in zip(titles, arms, strict=True)
        for tag, count in arm.results.get("failures", {}).items()
    ]
    return {
        "text": "Milestones reached at any time during an episode, and the reason every failed episode ended; "
        "'timeout:x' ran out of steps before reaching milestone x.",
        "milestones": {"columns": ["milestone", *titles], "rows": reached},
        "failures": {
            "columns": ["policy, world", "failure", "episodes"],
            "rows": failures or [["none", "-", "0"]],
            "text_columns": 2,
        },
    }


def training_curves(run: Path) -> dict[str, Points]:
    """Return quantity -> ``(step, value)`` points of a training run's metrics."""
    curves: dict[str, Points] = {}
    for content in read_metrics(run):
        for key, value in content.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(key, []).append((float(content["step"]), float(value)))
    return curves


# Panel title -> name in metrics.jsonl.
CURVES = {"training loss": "loss", "action error on held-out episodes": "validation_error"}


def learning(runs: Mapping[str, Path], trained: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return learning curves and the size of every training."""
    if not runs:
        return None
    metrics = {label: training_curves(folder) for label, folder in runs.items()}
    curves = {
        title: {label: _smoothed(found[key]) for label, found in metrics.items() if key in found}
        for title, key in CURVES.items()
    }
    curves = {title: lines for title, lines in curves.items() if lines}
    rows = []
    for label, content in trained.items():
        parameters, steps, seconds = (content.get(key) for key in ("parameters", "steps", "seconds"))
        rows.append(
            [
                label,
                f"{parameters / 1e6:.2f} M" if parameters else "-",
                f"{steps:,}" if steps else "-",
                minutes(seconds) if seconds else "-",
                f"{1000 * seconds / steps:.0f} ms" if steps and seconds else "-",
            ]
        )
    return {
        "text": "All policies saw the same demonstrations. Losses of different methods are not comparable with each "
        "other; the success rates above are."
        if len(runs) > 1
        else "One training run, one seed.",
        "svg": to_svg(plots.learning_plot(curves)) if curves else "",
        "table": {"columns": ["policy", "parameters", "steps", "training time", "per step"], "rows": rows},
    }


def _smoothed(points: Points) -> Points:
    """Average long curves over windows, so that the trend is visible and the page stays small."""
    width = max(1, len(points) // 120)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


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


def deployment(deployed: Evaluation | None) -> dict[str, Any] | None:
    """Return how punctual the control loop was, and what the twin changed."""
    if deployed is None:
        return None
    content = deployed.results
    gate = content.get("gate", {})
    rows = [[text, f"{content[key]:.4g} {unit}"] for key, (text, unit) in TIMING.items() if key in content]
    if "publish_hz" in gate:
        rows.append(["targets published by the safety gate", f"{gate['publish_hz']:.0f} Hz"])
        rows.append(["targets that the gate slowed down", f"{gate['limited']:,} of {gate['published']:,}"])
    loops = {"control loop": content, "safety gate": gate.get("timing", {})}
    loops = {title: loop for title, loop in loops.items() if "period_error_histogram" in loop}
    changes = _gap_changes(content.get("gap"))
    return {
        "text": f"The policy drove the {world(deployed)} over ROS 2 topics in real time. Control loop, inference, "
        "safety gate and robot are processes of their own, and the gate stands between policy and robot.",
        "svg": to_svg(plots.timing_plot(loops)) if loops else "",
        "timing": {"columns": ["real time", "measured"], "rows": rows},
        "gap": {"columns": ["what the twin changes", "by"], "rows": changes} if changes else None,
    }


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


def notes(
    evaluations: Sequence[Evaluation], deployed: Evaluation | None, trained: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return what limits the claims on the page."""
    found = []
    if deployed is not None and deployed.backend == "twin":
        found.append(
            "The robot is a MuJoCo twin in its own process behind the topics of a real arm, with physics, delays, "
            "cameras and noise that differ from the training simulation. It is not hardware."
        )
    if deployed is not None and deployed.results["n"] < 50:
        low, high = deployed.results["interval"]
        found.append(
            f"{deployed.results['n']} episodes on the {world(deployed)} leave an interval of "
            f"{100 * (high - low):.0f} percentage points."
        )
    if trained:
        found.append(
            "One training seed each: the intervals cover the noise of the episodes, not of training. Repeat with other "
            "seeds before claiming that one method is better than another."
        )
    times = {label: content["seconds"] for label, content in trained.items() if content.get("seconds")}
    if times and max(times.values()) > 1.5 * min(times.values()):
        listed = ", ".join(f"{label} {minutes(seconds)}" for label, seconds in times.items())
        found.append(f"Training times differ ({listed}); part of a difference in success may come from that.")
    found += [f"{arm.label}: {note}" for arm in evaluations for note in arm.results.get("notes", [])]
    return found

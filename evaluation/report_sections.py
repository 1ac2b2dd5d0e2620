"""The sections of the report, each from what a stage left on disk; None where there is nothing to show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simtoreal.data_collection.filters import Filter
from simtoreal.envs.errors import CheckpointError
from simtoreal.envs.figures import to_svg
from simtoreal.evaluation import film, plots
from simtoreal.evaluation.compare import NOT_DISTINGUISHABLE, changed_task, compare, elsewhere
from simtoreal.evaluation.results import Evaluation, EvaluationError
from simtoreal.policies.checkpoint import TRAINING, find_checkpoint, read_json
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
    kept: Filter | None,
    trained: Mapping[str, Mapping[str, Any]],
    practised: Mapping[str, Any] | None,
    evaluations: Sequence[Evaluation],
    deployments: Sequence[Evaluation],
    videos: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the cards of the pipeline picture; ``practised`` is the ``results.json`` of a co-training."""
    cards: list[dict[str, Any]] = []

    def add(step: str, headline: str, detail: str, *kinds: str, moment: float) -> None:
        video = next((v for kind in kinds for v in videos if v["kind"] == kind), None)
        picture = film.thumbnail(video["path"], moment) if video else None
        step = f"{len(cards) + 1} {step}"
        cards.append({"step": step, "headline": headline, "detail": detail, "picture": picture, "svg": None})

    if collected:
        speed = collected.get("episodes_per_s")
        who = ", ".join(collected["operators"][:3]) if collected.get("operators") else "a scripted expert"
        detail = f"by {who}" + (f", {speed:.0f} episodes/s" if speed else "")
        add("Demonstrate", f"{collected.get('episodes', '?')} episodes", detail, "demonstration", moment=0.3)
    if kept:
        accepted = sum(episode.accepted for episode in kept.episodes.values())
        detail = "demonstrations of all operators accepted; what contradicts the base operator is left out"
        add("Filter", f"{accepted} of {len(kept.episodes)}", detail, "demonstration", moment=0.45)
    if trained:
        label, run = next(iter(trained.items()))
        parts = [f"{run['parameters'] / 1e6:.1f} M parameters" if run.get("parameters") else ""]
        parts.append(f"{run['steps']:,} steps" if run.get("steps") else "")
        detail = f"to train {label}: " + ", ".join(part for part in parts if part)
        headline = minutes(run["seconds"]) if run.get("seconds") else label
        add("Learn", headline, detail, "demonstration", "simulation", moment=0.6)
    if practised:
        change = practised["final"]["success_rate"] - practised["base"]["success_rate"]
        imitated = practised["settings"].get("wovr", {}).get("imitation_rollouts")
        successes = "imitation of its successes and " if imitated else ""
        iterations = f"{len(practised['iterations'])} iterations of reinforcement"
        detail = f"percentage points of real success after {successes}{iterations}"
        add("Practise", points(change), detail, "practice", moment=0.5)
    if evaluations:
        main, *others = evaluations
        detail = f"success in {main.world} ({rate(main.results)})" + _others(main, others)
        add("Evaluate", percent(main.results["success_rate"]), detail, "simulation", moment=0.75)
    if deployments:
        main, *others = deployments
        detail = f"success on the {main.world} ({rate(main.results)})" + _others(main, others)
        add("Deploy", percent(main.results["success_rate"]), detail, main.backend, moment=0.9)
    return cards


def _others(main: Evaluation, others: Sequence[Evaluation]) -> str:
    def name(arm: Evaluation) -> str:
        return arm.label if arm.world == main.world else f"{arm.label}, {arm.world},"

    return "".join(f"; {name(arm)} {percent(arm.results['success_rate'])} ({rate(arm.results)})" for arm in others)


def success(evaluations: Sequence[Evaluation], deployments: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Return plot, table and verdicts of all success rates."""
    arms = [*evaluations, *deployments]
    if not arms:
        return None
    rows, drawn = [], []
    for arm in arms:
        low, high = arm.results["interval"]
        time = arm.results.get("time_to_success_s")
        label = f"{arm.label}, {arm.world}"
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
    checked = evaluations and not any(arm.results.get("notes") for arm in arms)
    return {
        "text": "Every rate has its number of episodes and a 95 % interval (Beta posterior under a uniform prior)."
        + (" No initial condition of these episodes was demonstrated." if checked else ""),
        "svg": to_svg(plots.success_plot(drawn)),
        "table": {"columns": ["policy, world", "success", "episodes", "95 % interval", "median time"], "rows": rows},
        "verdicts": _verdicts(evaluations, deployments),
    }


def _verdicts(evaluations: Sequence[Evaluation], deployments: Sequence[Evaluation]) -> list[str]:
    """Compare within every world, and then between worlds; a policy is called better only within one."""
    texts: list[str] = []
    apart: list[tuple[Evaluation, Evaluation]] = []
    for arms, preposition in ((evaluations, "in"), (deployments, "on the")):
        groups: list[list[Evaluation]] = []
        for arm in arms:
            group = next((group for group in groups if not elsewhere(group[0], arm)), None)
            if group is None:
                groups.append([arm])
            else:
                group.append(arm)
        for group in groups:
            texts += _within(group, f"{preposition} {group[0].world}") if len(group) > 1 else []
        apart += [(arms[0], group[0]) for group in groups[1:]]
    gaps = []
    for deployed in deployments:
        same = [arm for arm in evaluations if arm.label == deployed.label]
        # A single robot run is of the policy that the page is about, whatever it is called.
        simulated = (same or evaluations)[0] if same or (evaluations and len(deployments) == 1) else None
        if simulated is not None and simulated.world != deployed.world:
            gaps.append((simulated, deployed))
    tests = len(apart) + len(gaps)
    texts += [_between(first, second, tests) for first, second in apart]
    for simulated, deployed in gaps:
        gap = _gap(simulated, deployed, tests)
        texts.append(f"{deployed.label}: {gap}" if len(deployments) > 1 else f"{gap[:1].upper()}{gap[1:]}")
    return texts


def _within(arms: Sequence[Evaluation], where: str) -> list[str]:
    """Return what is known about the first of evaluations in one world; tested as ``simtoreal compare`` tests them."""
    result = _compare_paired_if_possible(arms)
    episodes = {arm.label: arm.results["n"] for arm in arms}
    texts = []
    # Those of the first come first.
    for pair in result["pairs"][: len(arms) - 1]:
        first, second = pair["first"], pair["second"]
        low, high = pair["difference_interval"]
        family = f" after Bonferroni over all {len(result['pairs'])} pairs" if len(result["pairs"]) > 1 else ""
        test = (
            f"{result['test']}, p = {pair['p_adjusted']:.2g}{family}, {episodes[first]} and {episodes[second]} episodes"
        )
        interval = f"95 % interval {points(-high)} to {points(-low)}"
        difference = f"{points(-pair['difference'])} percentage points ({interval})"
        if pair["verdict"] == NOT_DISTINGUISHABLE:
            texts.append(
                f"{first} and {second} are not distinguishable {where}: {difference}; {test}. "
                "More episodes would be needed to tell them apart."
            )
        else:
            texts.append(f"{pair['verdict']} {where}: {first} minus {second} is {difference}; {test}.")
    return texts + [f"{note[:1].upper()}{note[1:]}." for note in result["notes"]]


def _compare_paired_if_possible(arms: Sequence[Evaluation], alpha: float = 0.05) -> dict[str, Any]:
    try:
        return compare(arms, alpha=alpha)
    except EvaluationError:
        return compare(arms, paired=False, alpha=alpha)


def _between(first: Evaluation, second: Evaluation, tests: int) -> str:
    """Return the difference between evaluations in different worlds; it may come from the worlds."""
    result = _compare_paired_if_possible([first, second], alpha=0.05 / tests)
    return (
        f"The difference from {first.label} ({first.world}) to {second.label} ({second.world}) "
        f"{_difference(result, tests)}. It is not one of policies alone: {elsewhere(first, second)}."
    )


def _gap(simulated: Evaluation, deployed: Evaluation, tests: int) -> str:
    # They may well be called alike: it is the same policy.
    worlds = [dataclasses.replace(arm, label=arm.world) for arm in (simulated, deployed)]
    result = compare(worlds, paired=False, alpha=0.05 / tests)
    changed = changed_task(simulated, deployed)
    return f"the gap from {simulated.world} to the {deployed.world} {_difference(result, tests)}." + (
        f" It is not one of worlds alone: {changed}." if changed else ""
    )


def _difference(result: Mapping[str, Any], tests: int) -> str:
    """Return the difference of one pair, one of ``tests`` between worlds on the page."""
    (pair,) = result["pairs"]
    low, high = pair["difference_interval"]
    known = "is" if pair["verdict"] != NOT_DISTINGUISHABLE else "cannot be told from zero at this n, it is"
    p_value = min(1.0, tests * pair["p_value"])
    family = f" after Bonferroni over {tests} differences between worlds" if tests > 1 else ""
    return (
        f"{known} {points(pair['difference'])} percentage points (95 % interval {points(low)} to {points(high)}; "
        f"{result['test']}, p = {p_value:.2g}{family})"
    )


def kept_demonstrations(kept: Filter | None) -> dict[str, Any] | None:
    """Return the table per operator of a filter."""
    if kept is None:
        return None
    rows = [
        [
            f"{row['operator']} (base)" if row["base"] else row["operator"],
            str(row["episodes"]),
            f"{row['steps']:,}",
            f"{100 * row['bad_share']:.1f} %",
            f"{row['kept_steps']:,}",
            str(row["accepted"]),
        ]
        for row in kept.operators()
    ]
    return {
        "text": "What other operators did is compared, step by step, with what the base operator did in such states. A "
        "step is bad if it is unlikely although the state is familiar; what is new is kept. The policy learned from "
        "the kept steps. Nothing was deleted.",
        "table": {"columns": ["operator", "episodes", "steps", "bad steps", "kept steps", "accepted"], "rows": rows},
        "warnings": [f"{mode}: {text}" for mode, text in kept.report.get("warnings", {}).items()],
    }


def progress(evaluations: Sequence[Evaluation], deployments: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Return how far episodes get and how they fail."""
    arms = [*evaluations, *deployments]
    names = list(dict.fromkeys(name for arm in arms for name in arm.results.get("milestones", {})))
    if not names:
        return None
    titles = [f"{arm.label}, {arm.world}" for arm in arms]
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
        "text": f"{_data_of(runs)} Losses of different methods are not comparable with each other; the success rates "
        "above are."
        if len(runs) > 1
        else "One training run, one seed.",
        "svg": to_svg(plots.learning_plot(curves)) if curves else "",
        "table": {"columns": ["policy", "parameters", "steps", "training time", "per step"], "rows": rows},
    }


def _data_of(runs: Mapping[str, Path]) -> str:
    """Return whether the policies of several trainings saw the same demonstrations, as far as their checkpoints say."""
    fingerprints = {label: _fingerprint(folder) for label, folder in runs.items()}
    if unknown := ", ".join(label for label, fingerprint in fingerprints.items() if not fingerprint):
        return f"Whether all policies saw the same demonstrations is not known: no checkpoint of {unknown} says it."
    if len(set(fingerprints.values())) == 1:
        return "All policies saw the same demonstrations."
    return (
        "The policies did not see the same demonstrations, or not the same part of them; a difference in success may "
        "come from that."
    )


def _fingerprint(run: Path) -> str:
    try:
        data = read_json(find_checkpoint(run) / TRAINING).get("data") or {}
    except CheckpointError:
        return ""
    return str(data.get("fingerprint", ""))


def _smoothed(points: Points) -> Points:
    """Average long curves over windows, so that the trend is visible and the page stays small."""
    width = max(1, len(points) // 120)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


def notes(
    evaluations: Sequence[Evaluation],
    deployments: Sequence[Evaluation],
    trained: Mapping[str, Mapping[str, Any]],
    practised: Mapping[str, Any] | None,
) -> list[str]:
    """Return what limits the claims on the page."""
    found = []
    if any(arm.backend == "twin" for arm in deployments):
        found.append(
            "The robot is a MuJoCo twin in its own process behind the topics of a real arm, with physics, delays, "
            "cameras and noise that differ from the training simulation. It is not hardware."
        )
    for arm in deployments:
        if arm.results["n"] < 50:
            low, high = arm.results["interval"]
            which = f", {arm.label}," if len(deployments) > 1 else ""
            found.append(
                f"{arm.results['n']} episodes on the {arm.world}{which} leave an interval of "
                f"{100 * (high - low):.0f} percentage points."
            )
    if practised:
        found.append(
            "Success where the policy practised proves nothing by itself; all other rates were judged by the "
            "simulation or on the robot. The co-training was run once."
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
    for arm in [*evaluations, *deployments]:
        found += [f"{arm.label}, {arm.world}: {note}" for note in arm.results.get("notes", [])]
    return found

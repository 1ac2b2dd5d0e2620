"""Fair timing on a noisy machine: both sides run in turns in one process, and ratios are taken per round."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def read_no_flags(description: str | None) -> None:
    """Answer ``--help`` with what a benchmark does, and refuse flags where there are none."""
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def time_rounds(arms: Mapping[str, Callable[[], Any]], rounds: int = 9) -> dict[str, list[float]]:
    """Run every arm once per round, in rotating order, after one untimed warm-up; return seconds per round."""
    names = list(arms)
    for name in names:
        arms[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speed_headline(
    metric: str, seconds: Mapping[str, Sequence[float]], units: Mapping[str, float], ours: str, baseline: str
) -> dict[str, Any]:
    """Headline of a timing: median ratio of speeds over rounds, with the range of the middle 80 %.

    Args:
        metric: what is counted, e.g. ``"control steps/s"``.
        seconds: per arm and round.
        units: how much of the metric one run of each arm does.
        ours, baseline: names of arms.
    """
    rates = {name: [units[name] / value for value in values] for name, values in seconds.items()}
    ratios = sorted(a / b for a, b in zip(rates[ours], rates[baseline], strict=True))
    cut = len(ratios) // 10
    return {
        "metric": metric,
        "ours": statistics.median(rates[ours]),
        "baseline": statistics.median(rates[baseline]),
        "baseline_name": baseline,
        "ratio": statistics.median(ratios),
        "difference": None,
        "interval": [ratios[cut], ratios[-1 - cut]],
        "n": len(ratios),
        "p_value": None,
    }


def speed_arms(seconds: Mapping[str, Sequence[float]], units: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row per arm: median speed and its range over rounds."""
    rows = []
    for name, values in seconds.items():
        rates = sorted(units[name] / value for value in values)
        rows.append(
            {"name": name, "value": statistics.median(rates), "interval": [rates[0], rates[-1]], "n": len(rates)}
        )
    return rows


def write_benchmark(
    name: str,
    question: str,
    headline: Mapping[str, Any],
    arms: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    notes: str,
    seeds: Sequence[int] = (),
) -> Path:
    """Store a measurement in ``benchmarks/results/<name>.json`` (schema: render_results.py)."""
    path = RESULTS / f"{name}.json"
    content = {
        "name": name,
        "question": question,
        **provenance(seeds),
        "seconds": seconds,
        "headline": dict(headline),
        "arms": [dict(arm) for arm in arms],
        "notes": notes,
    }
    write_json(path, content)
    return path

"""Fair timing on a noisy machine: both sides run in turns in one process, and ratios are taken per round."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parts import Part, notes_on

from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def read_no_flags(description: str | None) -> None:
    """Answer ``--help`` with what a benchmark does, and refuse flags where there are none."""
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def result_name(name: str, parser: argparse.ArgumentParser, options: argparse.Namespace, *deciding: str) -> str:
    """Name of a result: the benchmark's own with the defaults, otherwise with what differs from them.

    Part of a benchmark must not take the place of the whole, nor the other way round.

    Args:
        name: of the benchmark.
        parser, options: its flags.
        deciding: those that decide what is measured, e.g. ``"seeds"``.
    """
    for option in deciding:
        value = getattr(options, option)
        if value != parser.get_default(option):
            name = "_".join([name, option, *map(str, value if isinstance(value, list) else [value])])
    return name


def time_rounds(
    arms: Mapping[str, Callable[[], Any]], rounds: int = 9, prepare: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Run every arm once per round, in rotating order, after one untimed warm-up; return seconds per round.

    Args:
        arms: what is timed.
        rounds: how often.
        prepare: done before every run of an arm, untimed; so that all begin with the same.
    """
    names = list(arms)
    for name in names:
        prepare()
        arms[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            prepare()
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
    notes: str | Sequence[str],
    seconds: float = 0.0,
    seeds: Sequence[int] = (),
    parts: Sequence[Part] = (),
) -> Path:
    """Store a measurement in ``benchmarks/results/<name>.json`` (schema: render_results.py).

    Args:
        name: of the result.
        question, headline, arms: see there.
        notes: likewise, one or several.
        seconds: of everything but ``parts``.
        seeds: what the measurement depends on.
        parts: that it was put together from; their seconds are added, and it is noted where they are of other commits.
    """
    path, more = RESULTS / f"{name}.json", notes_on(parts)
    if more:
        notes = [*([notes] if isinstance(notes, str) else notes), *more]
    content = {
        "name": name,
        "question": question,
        **provenance(seeds),
        "seconds": seconds + sum(one.seconds for one in parts),
        "headline": dict(headline),
        "arms": [dict(arm) for arm in arms],
        "notes": notes if isinstance(notes, str) else list(notes),
    }
    write_json(path, content)
    return path

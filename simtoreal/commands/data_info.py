"""Show what a dataset holds: episodes, success, arrays, sizes, operators, embodiment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every episode file is opened and checked on the way."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""


def main(config: Config) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    from simtoreal.data_collection.summary import summarize

    console = Console(markup=False)
    summary = summarize(config.dataset)
    table = Table(title=str(config.dataset), show_header=False)
    table.add_row("tasks", ", ".join(f"{name} ({count})" for name, count in summary["tasks"].items()))
    table.add_row("episodes", f"{summary['episodes']}, {summary['steps']} steps, {_size(summary['bytes'])}")
    # A count, not a rate: which episodes were stored was somebody's choice.
    table.add_row("successful", f"{summary['successes']} of {summary['episodes']}")
    if summary["failures"]:
        table.add_row("failures", ", ".join(f"{name} ({count})" for name, count in summary["failures"].items()))
    if summary["episodes"]:
        low, middle, high = summary["length_steps"]
        rate = summary["control_hz"]
        table.add_row("length", f"median {middle} steps ({middle / rate:.1f} s), from {low} to {high}")
    for name in ("operators", "sources", "instructions"):
        listed = [f"{key} ({count})" for key, count in summary[name].items()]
        rest = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        table.add_row(name, ", ".join(listed[:5]) + rest)
    table.add_row("masks", ", ".join(f"{name} ({count})" for name, count in summary["masks"].items()))
    table.add_row("embodiment", summary["embodiment"])
    table.add_row("action", summary["action"])
    if summary["unfinished"]:
        table.add_row("unfinished", f"{summary['unfinished']} part(s); 'simtoreal data recover' makes them episodes")
    console.print(table)
    arrays = Table(title="arrays (per step)")
    for name in ("name", "shape", "type", "size"):
        arrays.add_column(name, justify="right" if name == "size" else "left")
    for name, array in summary["arrays"].items():
        arrays.add_row(name, " x ".join(map(str, array["shape"])) or "scalar", array["dtype"], _size(array["bytes"]))
    console.print(arrays)
    if summary["sensors"]:
        console.print(_sensors(summary["sensors"], summary["steps"]))
    console.print(f"{config.dataset}: {summary['episodes']} episodes, {summary['steps']} steps, all readable")


def _sensors(sensors: dict[str, dict[str, Any]], steps: int) -> Table:
    from rich.table import Table

    table = Table(title=f"sensors (times: worst episode; counts: all {steps} steps)")
    for name in ("sensor", "age ms\nmedian p99 max", "skew\nms", "frames", "dropped", "repeats", "late"):
        table.add_column(name, justify="left" if name == "sensor" else "right", no_wrap=True)
    for name, sensor in sensors.items():
        ages = " ".join(f"{sensor[key]:.1f}" for key in ("age_median_ms", "age_p99_ms", "age_max_ms"))
        counts = (str(sensor[key]) for key in ("received", "dropped", "repeated", "late"))
        table.add_row(name, ages, f"{sensor['skew_max_ms']:.1f}", *counts)
    return table


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"

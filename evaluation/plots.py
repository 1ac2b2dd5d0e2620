"""Plots of evaluations, for reports and comparisons. Matplotlib draws them without a display."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simtoreal.envs.figures import COLORS, TEXT_COLOR, new_figure
from simtoreal.envs.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Of lines whose colour repeats.
STYLES = ("-", "--", ":", "-.")


def success_plot(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """Success rates as posterior shapes with their 95 % intervals, one row per arm.

    Args:
        arms: mappings with ``label``, ``successes``, ``n``, ``success_rate``, ``interval`` and optionally ``letters``.
    """
    from scipy.stats import beta

    figure, (ax,) = new_figure(7.2, 0.75 + 0.62 * len(arms))
    grid = np.linspace(0.0, 1.0, 401)
    for row, arm in enumerate(arms):
        color = COLORS[row % len(COLORS)]
        density = beta.pdf(grid, 1 + arm["successes"], 1 + arm["n"] - arm["successes"])
        ax.fill_between(100 * grid, -row, -row + 0.62 * density / density.max(), color=color, alpha=0.25, linewidth=0)
        low, high = arm["interval"]
        ax.plot([100 * low, 100 * high], [-row, -row], color=color, linewidth=3, solid_capstyle="round")
        ax.plot([100 * arm["success_rate"]], [-row], "o", color=color, markersize=8)
        letters = f"  {arm['letters']}" if arm.get("letters") else ""
        text = f"{100 * arm['success_rate']:.0f} %  ({arm['successes']}/{arm['n']}){letters}"
        ax.text(102, -row, text, va="center", ha="left", color=TEXT_COLOR, fontsize=9)
    ax.set_yticks([-row for row in range(len(arms))], [str(arm["label"]) for arm in arms])
    ax.set_ylim(-len(arms) + 0.6, 0.8)
    ax.set_xlim(0, 100)
    # Of the figure: below axes that long labels have made narrow, it would reach beyond the edge.
    figure.supxlabel(
        "success rate [%]: measured (dot), 95 % interval (bar), posterior (shape)", fontsize=9, color=TEXT_COLOR
    )
    ax.grid(axis="y", visible=False)
    return figure


def learning_plot(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Figure:
    """Learning curves, one panel per quantity.

    Args:
        curves: panel title -> run name -> points ``(optimisation step, value)``.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = new_figure(7.2, 2.6, columns=max(1, len(curves)))
    for ax, (title, runs) in zip(axes, curves.items(), strict=False):
        for index, (name, points) in enumerate(runs.items()):
            repeats, color = divmod(index, len(COLORS))
            style = STYLES[repeats % len(STYLES)]
            steps, values = np.asarray(points, dtype=np.float64).T
            marker = "o" if len(steps) < 12 else ""
            ax.plot(
                steps, values, color=COLORS[color], linestyle=style, linewidth=1.6, label=name, marker=marker,
                markersize=3.5,
            )  # fmt: skip
        ax.set_title(title, fontsize=10, color=TEXT_COLOR)
        ax.set_xlabel("optimisation step", fontsize=9, color=TEXT_COLOR)
        if all(value > 0 for points in runs.values() for _, value in points):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        if len(runs) > 1:
            ax.legend(fontsize=8, frameon=False)
    return figure


def timing_plot(loops: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Histograms of how late periodic loops woke up, one panel per loop, counts on a logarithmic axis.

    Args:
        loops: title -> mapping with ``period_error_histogram`` (``edges_ms`` and ``counts``, the last class open) and
            ``p99_period_error_ms``.
    """
    figure, axes = new_figure(7.2, 2.7, columns=len(loops))
    for ax, (title, loop), color in zip(axes, loops.items(), itertools.cycle(COLORS), strict=False):
        edges, counts = (loop["period_error_histogram"][key] for key in ("edges_ms", "counts"))
        names = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(edges)] + [f"> {edges[-1]:g}"]
        bars = ax.bar(range(len(counts)), counts, color=color, width=0.85)
        ax.bar_label(bars, labels=[f"{count:,}" if count else "" for count in counts], fontsize=7, color=TEXT_COLOR)
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(0, max([1, *counts]) * 4)
        ax.set_xticks(range(len(counts)), names, rotation=50, ha="right", fontsize=7.5)
        ax.set_title(f"{title}: 99 % within {loop['p99_period_error_ms']:.2g} ms", fontsize=10, color=TEXT_COLOR)
        ax.set_xlabel("lateness [ms]", fontsize=9, color=TEXT_COLOR)
        ax.grid(axis="x", visible=False)
    return figure


def practice_plot(points: Sequence[Mapping[str, Any]], iterations: Sequence[Mapping[str, Any]]) -> Figure:
    """Success of a co-training over its iterations: while learning, and measured in both worlds on equal conditions.

    Args:
        points: measurements with ``iteration`` and the rates of ``real`` and possibly ``imagined`` or ``simulation``.
        iterations: metrics of every iteration: ``iteration`` and ``success``, or apart by where rollouts began
            ``success_from_beginnings`` and ``success_from_keyframes``.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (ax,) = new_figure(7.2, 3.4)
    parted = any("success_from_beginnings" in line for line in iterations)
    while_learning = (
        {"success_from_keyframes": "from key frames", "success_from_beginnings": "from first frames"}
        if parted
        else {"success": "all rollouts"}
    )
    for color, (key, label) in zip((COLORS[5], COLORS[4]), while_learning.items(), strict=False):
        curve = [(line["iteration"], 100 * line[key]) for line in iterations if key in line]
        if curve:
            ax.plot(*np.array(curve).T, color=color, linewidth=1.2, label=f"while learning, {label}")
    for color, key, style in ((COLORS[1], "imagined", "s"), (COLORS[1], "simulation", "s"), (COLORS[0], "real", "o-")):
        # Both world models of a refresh are asked about the same iteration; what is real is told with each of them.
        found = {(point["iteration"], tuple(point[key]["interval"])): point[key] for point in points if key in point}
        if found:
            steps = np.array([iteration for iteration, _ in found])
            rates = 100 * np.array([rate["success_rate"] for rate in found.values()])
            bounds = 100 * np.array([rate["interval"] for rate in found.values()])
            label = key if key == "real" else f"{key}, same initial conditions"
            ax.errorbar(
                steps, rates, yerr=np.abs(bounds.T - rates), color=color, fmt=style, markersize=6, linewidth=1.6,
                capsize=3, label=label,
            )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(-3, 103)
    ax.set_xlabel("iteration of reinforcement", fontsize=9, color=TEXT_COLOR)
    ax.set_ylabel("success [%], 95 % interval", fontsize=9, color=TEXT_COLOR)
    ax.legend(fontsize=8, frameon=False, loc="best")
    return figure


def save_png(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    return path

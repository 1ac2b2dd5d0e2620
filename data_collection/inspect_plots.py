"""Plots of an inspected dataset. Matplotlib draws them without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simtoreal.envs.figures import COLORS, TEXT_COLOR, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 40


def _label(ax: Axes, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(x, fontsize=9, color=TEXT_COLOR)
    ax.set_ylabel(y, fontsize=9, color=TEXT_COLOR)
    if title:
        ax.set_title(title, fontsize=9.5, color=TEXT_COLOR, loc="left")


def _colors(names: Sequence[str]) -> dict[str, str]:
    unique = list(dict.fromkeys(names))
    return {name: COLORS[index % len(COLORS)] for index, name in enumerate(unique)}


def episodes_plot(episodes: Sequence[Mapping[str, Any]], period_s: float) -> Figure:
    """Length, idle share and jerk of every episode in their order, coloured by operator; failures are crosses."""
    figure, axes = new_figure(10.4, 2.9, 3)
    colors = _colors([episode["operator"] for episode in episodes])
    order = np.arange(len(episodes))
    panels = {
        "duration [s]": [episode["steps"] * period_s for episode in episodes],
        "idle [% of steps]": [100 * episode["motion"]["idle_share"] for episode in episodes],
        "jerk of commands [ranges/step³]": [max(episode["motion"]["action_jerk"], 1e-9) for episode in episodes],
    }
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        for operator, color in colors.items():
            for success, marker in ((True, "o"), (False, "x")):
                rows = [
                    row
                    for row, episode in enumerate(episodes)
                    if episode["operator"] == operator and episode["success"] == success
                ]
                label = operator if success or not any(e["success"] for e in episodes) else None
                if rows:
                    ax.plot(order[rows], np.asarray(values)[rows], marker, color=color, markersize=3.6, alpha=0.85,
                            label=label)  # fmt: skip
        if "jerk" in title:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, max(1.08 * max(values), 5.0 if "idle" in title else 0.0))
        _label(ax, "episode", title)
    if len(colors) > 1:
        axes[0].legend(fontsize=8, frameon=False, loc="best")
    return figure


def saturation_plot(episodes: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Share of steps at a bound per action dimension: mean over all steps, and the worst episode as a mark."""
    shares = np.array([episode["motion"]["saturation"] for episode in episodes])
    weights = np.array([episode["steps"] for episode in episodes], dtype=np.float64)
    mean, worst = np.average(shares, axis=0, weights=weights), shares.max(axis=0)
    count = min(len(names), _MOST_BARS)
    figure, (ax,) = new_figure(10.4, 2.5)
    ax.bar(np.arange(count), 100 * mean[:count], color=COLORS[0], width=0.7, label="all steps")
    ax.plot(np.arange(count), 100 * worst[:count], "_", color=COLORS[1], markersize=11, mew=2, label="worst episode")
    small = count > 12
    ax.set_xticks(np.arange(count), list(names[:count]), rotation=60 if small else 0, ha="right" if small else "center",
                  fontsize=7.5 if small else 9)  # fmt: skip
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8, frameon=False)
    _label(ax, "", "at the limit [% of steps]")
    return figure


def timing_plot(episodes: Sequence[Mapping[str, Any]], period_s: float) -> Figure | None:
    """Rate and largest deviation from the period of every episode; None if there are no stamps."""
    rows = [(index, e["timing"]) for index, e in enumerate(episodes) if e["timing"] is not None]
    if not rows:
        return None
    figure, axes = new_figure(10.4, 2.3, 2)
    order = [index for index, _ in rows]
    axes[0].plot(order, [timing["rate_hz"] for _, timing in rows], "o", color=COLORS[0], markersize=3.2)
    axes[0].axhline(1 / period_s, color="#8893a0", linewidth=1, linestyle="--")
    axes[0].ticklabel_format(useOffset=False)
    rate = 1 / period_s
    values = [timing["rate_hz"] for _, timing in rows]
    margin = max(0.05 * rate, 1.2 * max(abs(value - rate) for value in values))
    axes[0].set_ylim(rate - margin, rate + margin)
    _label(axes[0], "episode", "rate [Hz]", "dashed: what the embodiment says")
    axes[1].plot(order, [timing["jitter_ms"] for _, timing in rows], "o", color=COLORS[1], markersize=3.2)
    axes[1].set_ylim(bottom=0)
    _label(axes[1], "episode", "largest deviation [ms]", "from the control period, per episode")
    return figure


def starts_plot(starts: Sequence[Mapping[str, Any]], episodes: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Where the episodes began, one panel per thing; None if nothing is known."""
    if not starts:
        return None
    shown = list(starts)[:4]
    figure, axes = new_figure(min(10.4, 3.4 * len(shown) + 0.6), 3.2, len(shown))
    success = np.array([episode["success"] for episode in episodes])
    for ax, start in zip(axes, shown, strict=True):
        points = np.array(start["points"])
        for flags, marker, color in ((success, "o", COLORS[0]), (~success, "x", COLORS[1])):
            if flags.any():
                ax.plot(points[flags, 0], points[flags, 1], marker, color=color, markersize=4, alpha=0.75)
        metres = start["unit"] == "m"
        if metres:
            ax.set_aspect("equal", adjustable="datalim")
        _label(ax, "x [m]" if metres else "component 1", "y [m]" if metres else "component 2", start["name"])
    return figure


def motion_plot(episodes: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Dose of MOVE: speed factor, speed while moving and distance per thing; None if no scene moved."""
    moved = [episode for episode in episodes if episode["scene_motion"]]
    things = sorted({name for episode in moved for name in episode["scene_motion"]["things"]})
    if not moved or not things:
        return None
    figure, axes = new_figure(10.4, 2.6, 3)
    factors = [e["scene_motion"]["speed_factor"] for e in moved if "speed_factor" in e["scene_motion"]]
    axes[0].hist(factors, bins=np.linspace(0, 1, 16).tolist(), color=COLORS[6])
    _label(axes[0], "speed factor u", "episodes")
    for index, thing in enumerate(things):
        parts = [episode["scene_motion"]["things"].get(thing) for episode in moved]
        found = [part for part in parts if part]
        color = COLORS[index % len(COLORS)]
        options: dict[str, Any] = {"bins": 16, "color": color, "alpha": 0.6, "label": thing}
        axes[1].hist([100 * part["mean_speed_m_s"] for part in found], **options)
        axes[2].hist([100 * part["distance_m"] for part in found], **options)
    _label(axes[1], "speed while it moves [cm/s]", "episodes")
    _label(axes[2], "distance per episode [cm]", "episodes")
    axes[2].legend(fontsize=8, frameon=False)
    return figure

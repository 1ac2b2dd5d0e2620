"""Plots of a world model's evaluation: quantities against how far ahead they were imagined, and policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from simtoreal.envs.figures import COLORS, TEXT_COLOR, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beyond the horizon that this many episodes reach, a mean says little.
FEWEST_EPISODES = 2


def horizon_plot(curves: Mapping[str, Mapping[str, Any]], unit: str, *, title: str = "", scale: float = 1.0) -> Figure:
    """Lines with 95 % bands against control steps ahead.

    Args:
        curves: label -> curve, see :func:`~simtoreal.evaluation.bootstrap.curve_with_interval`.
        unit: of the vertical axis, after multiplication by ``scale``.
        title: above the plot.
    """
    figure, (ax,) = new_figure(6.4, 3.0)
    for index, (label, curve) in enumerate(curves.items()):
        shown = np.array(curve["n"]) >= FEWEST_EPISODES
        steps = 1 + np.flatnonzero(shown)
        mean, low, high = (
            scale * np.array([np.nan if value is None else value for value in curve[key]], float)[shown]
            for key in ("mean", "low", "high")
        )
        color = COLORS[index % len(COLORS)]
        ax.plot(steps, mean, color=color, linewidth=1.8, label=label)
        ax.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    ax.set_xlabel("control steps ahead", fontsize=9, color=TEXT_COLOR)
    ax.set_ylabel(unit, fontsize=9, color=TEXT_COLOR)
    ax.set_title(title, fontsize=10, color=TEXT_COLOR)
    if len(curves) > 1:
        ax.legend(fontsize=8, frameon=False)
    return figure


def validity_plot(policies: Mapping[str, Any]) -> Figure:
    """Success in the model against success in the simulator, one point per policy, with intervals."""
    figure, (ax,) = new_figure(4.4, 4.0)
    ax.plot([0, 100], [0, 100], color="#aab2bd", linewidth=1, linestyle="--")
    for index, row in enumerate(policies["rows"]):
        x, y = (100 * row[world]["success_rate"] for world in ("simulation", "imagined"))
        (left, right), (low, high) = (
            [100 * value for value in row[world]["interval"]] for world in ("simulation", "imagined")
        )
        color = COLORS[index % len(COLORS)]
        ax.plot([left, right], [y, y], color=color, linewidth=1.2)
        ax.plot([x, x], [low, high], color=color, linewidth=1.2)
        # Beyond the colours there are, another shape.
        ax.plot([x], [y], "os^"[index // len(COLORS) % 3], color=color, markersize=6, label=row["label"])
    ax.set_xlim(-2, 102)
    ax.set_ylim(-2, 102)
    ax.set_xlabel("success in the simulator [%]", fontsize=9, color=TEXT_COLOR)
    ax.set_ylabel("success in the model [%]", fontsize=9, color=TEXT_COLOR)
    ax.legend(fontsize=7.5, frameon=False, loc="lower right")
    return figure


def all_plots(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Return file name (without ``.png``) -> figure of everything that was measured."""
    curves = {
        "imagined": results["psnr_db"]["curve"],
        "real frames, through the tokenizer": results["psnr_reconstructed_db"]["curve"],
    }
    if results["psnr_at_rest_db"]:
        curves["imagined, told to stay where it is"] = results["psnr_at_rest_db"]["curve"]
    found = {"psnr": horizon_plot(curves, "PSNR [dB]")}
    if results["perceptual"]:
        found["perceptual"] = horizon_plot({"imagined": results["perceptual"]["curve"]}, "perceptual distance")
    if results["proprio_tcp_m"]:
        curve = results["proprio_tcp_m"]["curve"]
        found["proprio"] = horizon_plot({"imagined proprio": curve}, "end-effector error [mm]", scale=1000)
    for name, entry in (results["positions"] or {}).items():
        moved = "_moved" if entry.get("imagined_moved") else ""
        curves = {
            "imagined": entry[f"imagined{moved}"]["curve"],
            "real frames, through the tokenizer": entry[f"reconstructed{moved}"]["curve"],
            "real frames (floor of the probe)": entry[f"floor{moved}"]["curve"],
        }
        title = f"{name}, in episodes in which it moves" if moved else name
        found[f"position_{name}"] = horizon_plot(curves, "error [mm]", title=title, scale=1000)
    if results.get("policies"):
        found["policies"] = validity_plot(results["policies"])
    return found

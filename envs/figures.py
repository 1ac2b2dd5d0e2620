"""Figures for pages, drawn by Matplotlib without a display."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: distinguishable with colour-vision deficiency.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
TEXT_COLOR = "#39424e"
_GRID_COLOR, _SPINE_COLOR = "#d9dee5", "#aab2bd"


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``width`` x ``height`` inches and its axes, ``columns`` of them side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, index + 1) for index in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(_SPINE_COLOR)
        ax.tick_params(colors=TEXT_COLOR, labelsize=9)
        ax.grid(color=_GRID_COLOR, linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element to put into a page; equal figures give equal text.

    Text stays text, in the page's font.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "simtoreal", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

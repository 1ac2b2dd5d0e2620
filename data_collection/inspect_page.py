"""One self-contained HTML page about an inspected dataset."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import simtoreal
from simtoreal.data_collection import inspect_plots as plots
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import open_episode
from simtoreal.data_collection.inspection import Inspection
from simtoreal.envs import html_page
from simtoreal.envs.figures import to_svg
from simtoreal.envs.video import tile

TEMPLATE = Path(__file__).with_name("inspect.html")
# Suspicious episodes that are shown with pictures, and pictures of each.
SHOWN_EPISODES, SHOWN_FRAMES = 12, 6
_STRIP_HEIGHT_PX = 96


def write_page(inspection: Inspection, path: Path) -> Path:
    """Write the page and return its path.

    Raises:
        DatasetError: an episode that is to be shown is damaged.
    """
    return html_page.write_page(TEMPLATE, page_context(inspection), path)


def page_context(inspection: Inspection) -> dict[str, Any]:
    """Return the values of the template's variables.

    Raises:
        DatasetError: see :func:`write_page`.
    """
    summary, episodes, dataset = inspection.summary, inspection.episodes, inspection.dataset
    period = dataset.embodiment.control_period_s
    figures = {
        "episodes": plots.episodes_plot(episodes, period),
        "saturation": plots.saturation_plot(episodes, summary["action_names"]),
        "timing": plots.timing_plot(episodes, period),
        "starts": plots.starts_plot(summary["starts"], episodes),
        "motion": plots.motion_plot(episodes),
    }
    return {
        "title": str(dataset.path.resolve().name),
        "subtitle": f"{dataset.path.resolve()} · {summary['embodiment']}, {summary['control_hz']:g} Hz, action mode "
        f"{summary['action_mode']} ({len(summary['action_names'])} dimensions)",
        "tiles": tiles(inspection),
        "findings": inspection.findings,
        "suspicious": [
            {
                "name": name,
                "findings": inspection.suspicious[name],
                "episode": next(episode for episode in episodes if episode["name"] == name),
                "strip": film_strip(dataset, name) if summary["images_read"] else "",
            }
            for name in list(inspection.suspicious)[:SHOWN_EPISODES]
        ],
        "more_suspicious": list(inspection.suspicious)[SHOWN_EPISODES:],
        "plots": {name: to_svg(figure) for name, figure in figures.items() if figure is not None},
        "operators": operator_table(summary["operators"]),
        "starts": summary["starts"],
        "sensors": sensor_table(episodes),
        "cameras": camera_table(episodes),
        "smoothness": smoothness_table(episodes),
        "compatibility": summary["compatibility"],
        "behavior": summary["behavior"],
        "modes": summary["modes"],
        "successes": summary["successes"],
        "moved": sum(bool(episode["scene_motion"]) for episode in episodes),
        "duplicates": summary["duplicates"],
        "command": f"simtoreal data inspect {dataset.path} --output …",
        "version": simtoreal.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def tiles(inspection: Inspection) -> list[dict[str, str]]:
    """Return the numbers at the top of the page."""
    summary = inspection.summary
    idle = sum(e["motion"]["idle_share"] * e["steps"] for e in inspection.episodes) / summary["steps"]
    serious = sum(finding.weight == 3 for found in inspection.suspicious.values() for finding in found)
    lengths = sorted(episode["steps"] for episode in inspection.episodes)
    minutes = summary["seconds"] / 60
    return [
        {"value": str(summary["episodes"]), "label": f"episodes, {summary['successes']} successful"},
        {"value": f"{summary['steps']:,}".replace(",", " "), "label": f"steps, {minutes:.1f} minutes"},
        {"value": str(int(np.median(lengths))), "label": f"median steps, from {lengths[0]} to {lengths[-1]}"},
        {"value": f"{100 * idle:.0f} %", "label": "of all steps idle"},
        {
            "value": str(len(inspection.suspicious)),
            "label": f"episodes to look at, {serious} serious {'finding' if serious == 1 else 'findings'}",
        },
    ]


def operator_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return one row of text per operator."""
    return [
        [
            row["operator"],
            str(row["episodes"]),
            f"{row['successes']} of {row['episodes']}",
            str(row["steps"]),
            f"{100 * row['idle_share']:.1f} %",
            f"{row['median_action_jerk']:.3g}",
        ]
        for row in rows
    ]


def sensor_table(episodes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return one row per sensor that stamped its measurements: delay, repeated measurements; worst over episodes."""
    entries: dict[str, list[dict[str, float]]] = {}
    for episode in episodes:
        for name, entry in (episode["stamps"] or {"sensors": {}})["sensors"].items():
            entries.setdefault(name, []).append(entry)
    return [
        [
            name,
            f"{np.median([entry.get('delay_median_ms', np.nan) for entry in found]):.1f} ms",
            f"{max(entry.get('delay_max_ms', np.nan) for entry in found):.1f} ms",
            f"{100 * float(np.mean([entry['repeated_share'] for entry in found])):.1f} %",
        ]
        for name, found in entries.items()
    ]


def camera_table(episodes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return one row per camera: identical and frozen images, longest run, brightness of the first images."""
    found: dict[str, list[dict[str, Any]]] = {}
    for episode in episodes:
        for name, entry in episode["cameras"].items():
            found.setdefault(name, []).append(entry)
    return [
        [
            name,
            f"{100 * float(np.mean([entry['identical_share'] for entry in entries])):.1f} %",
            f"{100 * float(np.mean([entry['frozen_share'] for entry in entries])):.1f} %",
            str(max(entry["longest_frozen_steps"] for entry in entries)),
            f"{min(entry['brightness'] for entry in entries):.0f} to "
            f"{max(entry['brightness'] for entry in entries):.0f}",
        ]
        for name, entries in found.items()
    ]


def smoothness_table(episodes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return one row per path (TCP, its target): median jerk, smoothness and length, where the data have them."""
    rows = []
    for name in ("tcp", "target"):
        found = [episode["motion"] for episode in episodes if f"{name}_jerk_m_s3" in episode["motion"]]
        if found:
            smooth = [motion[f"{name}_smoothness"] for motion in found if motion[f"{name}_smoothness"] is not None]
            rows.append(
                [
                    {"tcp": "measured TCP", "target": "commanded target"}[name],
                    f"{np.median([motion[f'{name}_path_m'] for motion in found]):.2f} m",
                    f"{np.median([motion[f'{name}_jerk_m_s3'] for motion in found]):.1f} m/s³",
                    f"{np.median(smooth):.2f}" if smooth else "-",
                ]
            )
    return rows


def film_strip(dataset: Dataset, name: str) -> str:
    """Return evenly spaced images of the cameras of an episode as one JPEG, base64; empty without images.

    Raises:
        DatasetError: the episode is damaged.
    """
    import cv2

    info = next(episode for episode in dataset.episodes if episode.name == name)
    cells: list[np.ndarray] = []
    with open_episode(Path(str(info.path))) as file:
        # That one is missing is a finding, not the end of the page.
        held = [key for key in dataset.embodiment.image_keys if key in file["obs"]]
    for key in held:
        images = dataset.read(info, [f"obs/{key}"])[f"obs/{key}"]
        for step in np.linspace(0, len(images) - 1, SHOWN_FRAMES).round().astype(int):
            width = round(images.shape[2] * _STRIP_HEIGHT_PX / images.shape[1])
            cells.append(cv2.resize(images[step], (width, _STRIP_HEIGHT_PX), interpolation=cv2.INTER_AREA))
    if not cells:
        return ""
    picture = cv2.cvtColor(tile(cells, columns=SHOWN_FRAMES, gap=3), cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return base64.b64encode(data.tobytes()).decode("ascii")

"""What deserves a person's attention in a dataset, in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from simtoreal.data_collection.inspect_set import OUTLIER
from simtoreal.envs.embodiment import Embodiment

# Shares of an episode's steps above which it is worth a look.
MUCH_IDLE, MUCH_FROZEN, MUCH_REPEATED = 0.3, 0.02, 0.1
MUCH_SATURATION = 0.5
LONG_REST_S = 1.0
# Sensors of one step must be closer together than this part of the control period.
MUCH_SKEW_PERIODS = 1.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that somebody should look at.

    Attributes:
        kind: short name, e.g. ``frozen``.
        text: one sentence with numbers.
        remedy: what can be done about it, or empty.
        weight: 3 wrong data, 2 probably bad for training, 1 good to know.
    """

    kind: str
    text: str
    remedy: str = ""
    weight: int = 2


def episode_findings(episode: dict[str, Any], embodiment: Embodiment) -> Iterator[Finding]:
    """Yield what is suspicious about one episode.

    Args:
        episode: see :func:`~simtoreal.data_collection.inspection.describe_episode`.
        embodiment: of the dataset.
    """
    motion, timing, stamps = episode["motion"], episode["timing"], episode["stamps"]
    for line in episode["layout"]:
        yield Finding(kind="layout", text=line, weight=3)
    if episode.get("duplicate_of"):
        text = f"the same as, or nearly, episode {episode['duplicate_of']}"
        yield Finding(kind="duplicate", text=text, remedy="data edit --remove", weight=3)
    for camera, images in episode["cameras"].items():
        if images["frozen_share"] > MUCH_FROZEN:
            text = (
                f"{camera} repeats the image before in {100 * images['frozen_share']:.0f} % of the steps although the "
                f"robot moves (up to {images['longest_frozen_steps']} in a row)"
            )
            yield Finding(kind="frozen", text=text, weight=3)
    if timing is not None and timing["gaps"]:
        text = f"{_count(timing['gaps'], 'gap')} in time, the longest step took {timing['longest_interval_ms']:.0f} ms"
        yield Finding(kind="gaps", text=text)
    if stamps is not None:
        limit_ms = MUCH_SKEW_PERIODS * 1000 * embodiment.control_period_s
        if stamps["skew_ms"]["max"] > limit_ms:
            text = f"sensors of one step are up to {stamps['skew_ms']['max']:.0f} ms apart"
            yield Finding(kind="skew", text=text)
        for sensor, entry in stamps["sensors"].items():
            if entry["repeated_share"] > MUCH_REPEATED:
                text = (
                    f"{sensor} shows the same measurement again in {100 * entry['repeated_share']:.0f} % of the steps"
                )
                yield Finding(kind="stale", text=text)
    if motion["idle_share"] > MUCH_IDLE:
        text = f"stands idle for {100 * motion['idle_share']:.0f} % of its steps"
        yield Finding(kind="idle", text=text, remedy="data edit --trim-idle")
    elif motion["idle_start_steps"] * embodiment.control_period_s > LONG_REST_S:
        seconds = motion["idle_start_steps"] * embodiment.control_period_s
        yield Finding(kind="idle", text=f"rests for {seconds:.1f} s before it begins", remedy="data edit --trim-idle")
    moving = motion["saturation"][:-1] if embodiment.action.mode == "ee_delta" else motion["saturation"]
    worst = int(np.argmax(moving)) if moving else 0
    if moving and moving[worst] > MUCH_SATURATION:
        text = f"action '{embodiment.action.names[worst]}' is at its limit in {100 * moving[worst]:.0f} % of the steps"
        yield Finding(kind="saturation", text=text)
    for quantity, deviation in episode["outlier"].items():
        if abs(deviation) <= OUTLIER:
            continue
        if quantity == "length":
            text = f"takes {episode['steps']} steps, far {'more' if deviation > 0 else 'less'} than other episodes"
        else:
            text = f"its commands are far {'jerkier' if deviation > 0 else 'smoother'} than those of other episodes"
        yield Finding(kind=quantity, text=text)
    for name, verdict in episode.get("compatibility", {}).items():
        if not verdict["accepted"]:
            text = f"filter '{name}' rejects it: {verdict['bad_steps']} bad steps"
            yield Finding(kind="compatibility", text=f"{text}, compatibility {verdict['compatibility']:.2f}")
    if episode["failure"] == "aborted":
        yield Finding(kind="aborted", text="was cut off while it was recorded", weight=1)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def dataset_findings(summary: dict[str, Any], episodes: list[dict[str, Any]], embodiment: Embodiment) -> list[Finding]:
    """Return what is worth knowing about the dataset as a whole, most serious first."""
    found = [*_content_findings(summary, episodes), *_sensor_findings(episodes, embodiment)]
    return sorted(found, key=lambda finding: -finding.weight)


def _content_findings(summary: dict[str, Any], episodes: list[dict[str, Any]]) -> Iterator[Finding]:
    count = summary["episodes"]
    kinds = [pair["kind"] for pair in summary["duplicates"]]
    for kind in ("exact", "trimmed"):
        if copies := kinds.count(kind):
            text = (
                f"{_count(copies, f'{kind} copy', f'{kind} copies')} of other episodes: they count twice, and may be "
            )
            text += "held out and trained on at once"
            yield Finding(kind="duplicates", text=text, remedy="data edit --remove", weight=3)
    if near := kinds.count("near"):
        yield Finding(kind="duplicates", text=f"{_count(near, 'pair')} of episodes with nearly the same motion")
    uneven = sum(bool(episode["layout"]) for episode in episodes)
    if uneven:
        yield Finding(kind="layout", text=f"{_count(uneven, 'episode')} with other arrays than the first one", weight=3)
    for entry in summary["drift"][:5]:
        text = f"{entry['name']} drifts from {entry['first']:.3g} to {entry['last']:.3g} over the episodes"
        yield Finding(kind="drift", text=f"{text} (rank correlation {entry['correlation']:+.2f})")
    if summary["successes"] < count:
        failed = count - summary["successes"]
        text = f"{failed} of {count} episodes failed; policies learn from the mask 'train', which leaves them out"
        yield Finding(kind="failures", text=text, weight=1)
    assumed = sum(episode["success_assumed"] for episode in episodes)
    if assumed:
        text = f"{_count(assumed, 'imported episode')} said nothing about success and count as successful"
        yield Finding(kind="success", text=text, weight=1)
    moved = sum(episode["collected_with_motion"] for episode in episodes)
    if 0 < moved < count:
        text = f"{moved} of {count} episodes were collected while the scene moved (MOVE); masks 'move' and 'static'"
        yield Finding(kind="move", text=text, remedy="leave them out of what a world model learns from", weight=1)
    idle = sum(episode["motion"]["idle_share"] * episode["steps"] for episode in episodes) / summary["steps"]
    if idle > MUCH_IDLE / 2:
        text = f"the robot stands idle in {100 * idle:.0f} % of all steps: a policy learns to wait"
        yield Finding(kind="idle", text=text, remedy="data edit --trim-idle")
    for start in summary["starts"]:
        if start["repeated"] > 0.1 * count:
            text = f"{start['repeated']} episodes begin with '{start['name']}' within 1 mm of an earlier one"
            yield Finding(kind="coverage", text=text)
        elif count >= 10 and start["unit"] == "m" and start["occupied"] < 0.6 * start["expected"]:
            text = (
                f"starts of '{start['name']}' fill {100 * start['occupied']:.0f} % of the cells of their box; spread "
                f"evenly they would fill {100 * start['expected']:.0f} %"
            )
            yield Finding(kind="coverage", text=text)


def _sensor_findings(episodes: list[dict[str, Any]], embodiment: Embodiment) -> Iterator[Finding]:
    frozen = sum(any(c["frozen_share"] > MUCH_FROZEN for c in episode["cameras"].values()) for episode in episodes)
    if frozen:
        yield Finding(kind="frozen", text=f"{_count(frozen, 'episode')} with frozen images", weight=3)
    timed = [episode["timing"] for episode in episodes if episode["timing"] is not None]
    gaps = sum(timing["gaps"] for timing in timed)
    if gaps:
        yield Finding(kind="gaps", text=f"{_count(gaps, 'gap')} in time over {_count(len(timed), 'episode')}")
    rate = float(np.median([timing["rate_hz"] for timing in timed])) if timed else embodiment.control_hz
    if abs(rate - embodiment.control_hz) > 0.02 * embodiment.control_hz:
        text = f"steps come at {rate:.2f} Hz (median), the embodiment says {embodiment.control_hz:g} Hz"
        yield Finding(kind="rate", text=text, weight=3)
    if not timed:
        yield Finding(kind="time", text="the episodes hold no time stamps; rate and gaps are unknown", weight=1)

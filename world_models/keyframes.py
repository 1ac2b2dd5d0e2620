"""Key frames: real moments shortly before it matters, in which imagined rollouts begin (KIR, WoVR §3.2).

WoVR gives the instants near contacts and failures by hand. Here they are found:

* ``contact``: a finger begins or ceases to touch something; where no contacts were recorded, the gripper is told to
  open or close;
* ``attempt``: in a failure, the last time the gripper closed;
* ``drop``: in a failure, contact is lost though the gripper is told to be closed;
* ``divergence``: in a failure, the arm leaves the states in which successes are at about the same time.

A rollout begins some steps before such an event, never close to a success and never so late that nothing can be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simtoreal.data_collection.dataset import EPISODES
from simtoreal.data_collection.episode import open_episode, read_episode, read_info
from simtoreal.envs.embodiment import TARGET_NAMES
from simtoreal.world_models.cotrain_config import KeyframeConfig
from simtoreal.world_models.video_data import POSITIVE_FRAMES, VideoData

CONTACT, ATTEMPT, DROP, DIVERGENCE = "contact", "attempt", "drop", "divergence"
# Contacts flicker: events of a kind within this many steps of the one before are the same event.
_SAME_EVENT_STEPS = 5
# Of the divergence: frames of successes that are compared with, steps that count as one unit of distance, the share of
# held-out frames of successes inside the tube, and frames in a row outside that count.
_TUBE_FRAMES, _TUBE_STEPS, _TUBE_SHARE, _TUBE_LEFT = 4000, 20.0, 0.98, 3
_GRIPPER = TARGET_NAMES.index("target_gripper")


@dataclass(frozen=True)
class Keyframe:
    """A start in the middle of an episode.

    Attributes:
        episode: row in :class:`VideoData`.
        step: where the rollout begins, in control steps from the beginning of the episode.
        event: step of what is ahead.
        reason: what that is.
    """

    episode: int
    step: int
    event: int
    reason: str


def read_contacts(data: VideoData) -> list[np.ndarray | None]:
    """Return for every episode whether a finger touches each object *after* the action of every step ``(T, K)`` bool,
    or None where that was not recorded.

    Raises:
        DatasetError: an episode is damaged or gone.
    """
    found: list[np.ndarray | None] = []
    for name in data.names:
        folder, _, number = name.rpartition("/")
        path = Path(folder) / EPISODES / f"{number}.hdf5"
        with open_episode(path) as file:
            recorded = "contacts" in read_info(file, path).columns
        found.append(read_episode(path, ["step/contacts"])[1]["step/contacts"].astype(bool) if recorded else None)
    return found


def find_keyframes(
    data: VideoData,
    config: KeyframeConfig,
    *,
    memory: int,
    horizon: int,
    contacts: Sequence[np.ndarray | None] | None = None,
    seed: int = 0,
) -> tuple[Keyframe, ...]:
    """Return the key frames of real episodes, ordered by episode and step.

    Args:
        data: the episodes.
        config: which and how many.
        memory: frames that a world model remembers; a key frame has as many before it, itself included.
        horizon: control steps after which the task ends.
        contacts: see :func:`read_contacts`, which is the default.
        seed: decides how long before the events the rollouts begin, and which are left out if there are too many.
    """
    touches = read_contacts(data) if contacts is None else list(contacts)
    left = _divergences(data)
    rng = np.random.default_rng([seed, len(data.ends)])
    found: dict[bool, list[Keyframe]] = {True: [], False: []}
    for episode, (start, end) in enumerate(zip(data.starts, data.ends, strict=True)):
        success, length = bool(data.success[episode]), int(end - start)
        latest = min(length - 1, horizon - config.remaining_steps)
        if success:
            latest = min(latest, length - POSITIVE_FRAMES - config.margin_steps)
        events = _events(data, episode, touches[episode], left.get(episode))
        places: dict[int, Keyframe] = {}
        for event, reason in events:
            step = event - int(rng.integers(config.lead_steps[0], config.lead_steps[1] + 1))
            if max(1, memory - 1) <= step <= latest:
                places.setdefault(step, Keyframe(episode, step, event, reason))
        kept = list(places.values())
        if len(kept) > config.per_episode:
            kept = [kept[row] for row in rng.choice(len(kept), config.per_episode, replace=False)]
        found[success] += kept
    return tuple(sorted(_fewer(found, config.most, rng), key=lambda one: (one.episode, one.step)))


def _fewer(found: dict[bool, list[Keyframe]], most: int, rng: np.random.Generator) -> list[Keyframe]:
    """At most ``most``, half of them from failures if there are as many."""
    failures = min(len(found[False]), max(most // 2, most - len(found[True])))
    counts = {False: failures, True: min(len(found[True]), most - failures)}
    return [
        found[success][row]
        for success, count in counts.items()
        for row in rng.choice(len(found[success]), count, replace=False)
    ]


def _events(data: VideoData, episode: int, touches: np.ndarray | None, divergence: int | None) -> list[tuple[int, str]]:
    """What happens in an episode: ``(frame that shows it, reason)``."""
    frames = slice(data.starts[episode], data.ends[episode])
    opened = _commanded_open(data, frames)
    # A command changes between two actions; the frame of the later one is the last before it has an effect.
    commands = np.flatnonzero(np.diff(opened.astype(int))) + 1 if opened is not None else np.zeros(0, int)
    closings = [int(step) for step in commands if opened is not None and not opened[step]]
    if touches is None:
        events = [(int(step), CONTACT) for step in _first_of_each(commands)]
    else:
        # Row t is what is touched after action t, which frame t + 1 shows.
        changed = np.flatnonzero((touches[1:] != touches[:-1]).any(-1)) + 2
        events = [(int(step), CONTACT) for step in _first_of_each(changed)]
    if data.success[episode]:
        return events
    if closings:
        events.append((closings[-1], ATTEMPT))
    if touches is not None and opened is not None:
        held = touches.any(-1)
        lost = np.flatnonzero(held[:-1] & ~held[1:] & ~opened[1:]) + 2
        events += [(int(step), DROP) for step in _first_of_each(lost)]
    if divergence is not None:
        events.append((divergence, DIVERGENCE))
    return events


def _commanded_open(data: VideoData, frames: slice) -> np.ndarray | None:
    """Whether the gripper is told to be open by the action of each frame; None if nothing is known of a gripper."""
    if data.targets.shape[1]:
        return np.asarray(data.targets[frames, _GRIPPER] > 0.5)
    if "gripper" in data.embodiment.action.names:
        return np.asarray(data.actions[frames, data.embodiment.action.names.index("gripper")] > 0)
    return None


def _first_of_each(steps: np.ndarray) -> np.ndarray:
    """Steps, ascending, without those that follow closely on another."""
    if not len(steps):
        return steps
    return steps[np.concatenate([[True], np.diff(steps) > _SAME_EVENT_STEPS])]


def _divergences(data: VideoData) -> dict[int, int]:
    """Failed episode -> first frame from which on it is where no success is at about that time."""
    good = data.frames_of(data.success)
    if data.success.sum() < 2 or data.success.all():
        return {}
    scale = data.proprio[good].std(0)
    moving = scale > 1e-4
    time = np.arange(len(data)) - data.first_frame
    points = np.concatenate([data.proprio[:, moving] / scale[moving], time[:, None] / _TUBE_STEPS], 1)
    episode = np.repeat(np.arange(len(data.ends)), data.ends - data.starts)
    tube = good[:: -(-len(good) // _TUBE_FRAMES)]
    judged = tube[:: -(-len(tube) // 500)]
    apart = _distances(points[judged], points[tube], episode[judged][:, None] == episode[tube])
    threshold = float(np.quantile(apart, _TUBE_SHARE))
    found = {}
    for number in np.flatnonzero(~data.success):
        frames = np.arange(data.starts[number], data.ends[number])
        outside = _distances(points[frames], points[tube]) > threshold
        if len(outside) >= _TUBE_LEFT:
            held = np.lib.stride_tricks.sliding_window_view(outside, _TUBE_LEFT).all(-1)
            if held.any():
                found[int(number)] = int(held.argmax())
    return found


def _distances(points: np.ndarray, tube: np.ndarray, excluded: np.ndarray | None = None) -> np.ndarray:
    """Distance ``(N,)`` of each point ``(N, D)`` to the nearest of ``tube`` ``(M, D)`` that is not excluded."""
    squared = (points**2).sum(1)[:, None] + (tube**2).sum(1) - 2 * points @ tube.T
    if excluded is not None:
        squared[excluded] = np.inf
    nearest = np.sqrt(np.maximum(squared.min(1), 0.0))
    return np.asarray(nearest[np.isfinite(nearest)])

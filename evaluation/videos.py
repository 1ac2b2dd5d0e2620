"""Videos of a few successes and failures, as the policy's cameras saw them and from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.envs.files import explained_disk_errors
from simtoreal.envs.rollout import EpisodeResult, Listener, Observation, Step
from simtoreal.envs.video import tile, write_video
from simtoreal.evaluation.outside import OutsideView
from simtoreal.evaluation.results import EvaluationError

# Playback height: small policy images are enlarged by whole factors up to about this many pixels.
_DISPLAY_HEIGHT = 256
KINDS = ("success", "failure")
_OUTSIDE = "_outside"


@dataclass
class _Clip:
    """Images of every camera, and the simulation state if there is one, at every step so far."""

    images: list[list[np.ndarray]] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)


class EpisodeVideos(Listener):
    """Writes ``success_<seed>.mp4`` and ``failure_<seed>.mp4`` for the first few episodes of each kind to end.

    Frames are kept in memory only while a kind is still wanted, for the running episodes.

    Args:
        folder: where the videos go; existing ones count, so that a resumed evaluation makes no more than asked.
        image_keys: observation keys of the cameras, shown side by side.
        fps: control rate, so that videos play in real time.
        limit: number of videos of each kind.
        outside: draws the first video of each kind from outside as well, if the environment records ``sim_state``.
    """

    def __init__(
        self, folder: Path, image_keys: Sequence[str], fps: float, limit: int, outside: OutsideView | None = None
    ) -> None:
        self.folder, self.image_keys, self.fps, self.outside = folder, tuple(image_keys), fps, outside
        written = list(folder.glob("*.mp4"))
        self.written = {kind: sum(path.name.startswith(f"{kind}_") for path in written) for kind in KINDS}
        self.limit = limit
        self.clips: dict[int, _Clip] = {}

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """Begin to keep the frames of a slot."""
        self.clips.pop(slot, None)
        if min(self.written.values()) < self.limit:
            self.clips[slot] = _Clip()
            self._keep(slot, observation, info)

    def on_step(self, step: Step) -> None:
        """Keep the frame that follows the action."""
        for row, slot in enumerate(step.slots):
            if int(slot) in self.clips:
                state = {"sim_state": step.info["sim_state"][row]} if "sim_state" in step.info else {}
                self._keep(int(slot), {key: step.next_observation[key][row] for key in self.image_keys}, state)

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """Write the episode if its kind is still wanted."""
        clip = self.clips.pop(slot, None)
        kind = "success" if result.success else "failure"
        if clip is None or self.written[kind] >= self.limit:
            return
        safe = "The episodes up to this one are stored; free space and run the same command again to continue."
        with explained_disk_errors(self.folder, EvaluationError, safe):
            self._write(clip, kind, result.seed)
        self.written[kind] += 1

    def _write(self, clip: _Clip, kind: str, seed: int) -> None:
        if self.outside is not None and clip.states and self.written[kind] == 0:
            path = self.folder / f"{kind}_{seed}{_OUTSIDE}.mp4"
            write_video(path, self._held(self.outside.frames(clip.states, clip.images)), self.fps)
        else:
            path = self.folder / f"{kind}_{seed}.mp4"
            scale = max(1, round(_DISPLAY_HEIGHT / clip.images[0][0].shape[0]))
            pictures = (tile(images, columns=len(images)) for images in clip.images)
            write_video(path, self._held(pictures), self.fps, scale=scale)

    def _keep(self, slot: int, observation: Observation, info: dict[str, Any]) -> None:
        self.clips[slot].images.append([observation[key].copy() for key in self.image_keys])
        if "sim_state" in info:
            self.clips[slot].states.append(info["sim_state"].copy())

    def _held(self, frames: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        """Stay on the last picture for half a second, so that a looping video shows how it ended."""
        last = None
        for last in frames:
            yield last
        if last is not None:
            yield from [last] * round(self.fps / 2)


def list_videos(folder: Path) -> list[dict[str, Any]]:
    """Return ``{"file", "seed", "success", "outside"}`` of every video that :class:`EpisodeVideos` wrote.

    Successes come first, and among equals those drawn from outside.
    """
    videos = []
    for path in folder.glob("*.mp4"):
        outside = path.stem.endswith(_OUTSIDE)
        kind, _, seed = path.stem.removesuffix(_OUTSIDE).partition("_")
        if kind in KINDS and seed.isdecimal():
            file = f"{folder.name}/{path.name}"
            videos.append({"file": file, "seed": int(seed), "success": kind == "success", "outside": outside})
    return sorted(videos, key=lambda video: (not video["success"], not video["outside"], video["seed"]))

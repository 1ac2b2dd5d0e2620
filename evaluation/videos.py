"""Videos of a few successes and failures, as the policy's cameras saw them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.envs.rollout import EpisodeResult, Listener, Observation, Step
from simtoreal.envs.video import tile, write_video

# Playback height: small policy images are enlarged by whole factors up to about this many pixels.
_DISPLAY_HEIGHT = 256


class EpisodeVideos(Listener):
    """Writes ``success_<seed>.mp4`` and ``failure_<seed>.mp4`` for the first few episodes of each kind to end.

    Frames are kept in memory only while a kind is still wanted, for the running episodes.

    Args:
        folder: where the videos go; existing ones count, so that a resumed evaluation makes no more than asked.
        image_keys: observation keys of the cameras, shown side by side.
        fps: control rate, so that videos play in real time.
        limit: number of videos of each kind.
    """

    def __init__(self, folder: Path, image_keys: Sequence[str], fps: float, limit: int) -> None:
        self.folder, self.image_keys, self.fps = folder, tuple(image_keys), fps
        written = list(folder.glob("*.mp4"))
        self.wanted = {
            kind: limit - sum(path.name.startswith(f"{kind}_") for path in written) for kind in ("success", "failure")
        }
        self.frames: dict[int, list[np.ndarray]] = {}

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """Begin to keep the frames of a slot."""
        self.frames.pop(slot, None)
        if max(self.wanted.values()) > 0:
            self.frames[slot] = [self._picture(observation)]

    def on_step(self, step: Step) -> None:
        """Keep the frame that follows the action."""
        for row, slot in enumerate(step.slots):
            if int(slot) in self.frames:
                single = {key: step.next_observation[key][row] for key in self.image_keys}
                self.frames[int(slot)].append(self._picture(single))

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """Write the episode if its kind is still wanted."""
        frames = self.frames.pop(slot, None)
        kind = "success" if result.success else "failure"
        if frames is None or self.wanted[kind] <= 0:
            return
        self.wanted[kind] -= 1
        scale = max(1, round(_DISPLAY_HEIGHT / frames[0].shape[0]))
        # Half a second on the last picture, so that a looping video shows how it ended.
        held = frames + [frames[-1]] * round(self.fps / 2)
        write_video(self.folder / f"{kind}_{result.seed}.mp4", held, self.fps, scale=scale)

    def _picture(self, observation: Observation) -> np.ndarray:
        images = [observation[key] for key in self.image_keys]
        return tile(images, columns=len(images)).copy()


def list_videos(folder: Path) -> list[dict[str, Any]]:
    """Return ``{"file", "seed", "success"}`` of every video that :class:`EpisodeVideos` wrote, by kind and seed."""
    videos = []
    for path in sorted(folder.glob("*.mp4")):
        kind, _, seed = path.stem.partition("_")
        with contextlib.suppress(ValueError):
            videos.append({"file": f"{folder.name}/{path.name}", "seed": int(seed), "success": kind == "success"})
    return sorted(videos, key=lambda video: (not video["success"], video["seed"]))

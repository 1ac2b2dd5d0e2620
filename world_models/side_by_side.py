"""Videos in which what was imagined runs beside what really happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from simtoreal.envs.video import tile, write_video

# Small policy images are enlarged by whole factors up to about this many pixels.
DISPLAY_PX = 160


def side_by_side(columns: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yield one picture per step: a column per video, a row per camera.

    Args:
        columns: label -> ``(T, V, H, W, 3)`` uint8; a shorter video stays on its last frame.
    """
    labels, videos = list(columns), list(columns.values())
    views = videos[0].shape[1]
    scale = max(1, round(DISPLAY_PX / videos[0].shape[2]))
    for step in range(max(map(len, videos))):
        cells = [video[min(step, len(video) - 1), view] for view in range(views) for video in videos]
        texts = [*labels, *[""] * (len(cells) - len(labels))]
        yield tile(cells, columns=len(videos), labels=texts, scale=scale, gap=4)


def write_side_by_side(path: Path, episodes: list[Mapping[str, np.ndarray]], fps: float) -> Path:
    """Write episodes one after the other into one video, each held for half a second at its end.

    Args:
        path: file to write.
        episodes: see :func:`side_by_side`; the same labels in all of them.
        fps: control rate, for real time.

    Raises:
        ConfigError: there is nothing to write.
    """

    def frames() -> Iterator[np.ndarray]:
        for columns in episodes:
            last = None
            for last in side_by_side(columns):
                yield last
            if last is not None:
                yield from [last] * round(fps / 2)

    return write_video(path, frames(), fps)

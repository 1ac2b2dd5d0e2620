"""Pictures and videos of episodes for a report: demonstrations, thumbnails and film strips."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from simtoreal.envs.errors import SimtorealError
from simtoreal.envs.files import atomic_path
from simtoreal.envs.video import read_video, tile


def embed(path: Path) -> str:
    """Return the content of a file as base64 text, to put into a page.

    Raises:
        SimtorealError: the file cannot be read.
    """
    try:
        return base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise SimtorealError(f"cannot read {path}: {error}") from error


def encode_jpeg(picture: np.ndarray, quality: int = 88) -> bytes:
    """Encode an RGB picture ``(H, W, 3)`` uint8 as JPEG."""
    import cv2

    good, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not good:
        raise SimtorealError(f"a picture of shape {picture.shape} could not be encoded as JPEG")
    return bytes(data)


def thumbnail(video: Path, moment: float) -> str:
    """Return the frame at a fraction of the video (0 first, 1 last), as base64 JPEG."""
    frames = read_video(video)
    return base64.b64encode(encode_jpeg(frames[round(moment * (len(frames) - 1))])).decode("ascii")


def film_strip(videos: Mapping[str, Path], *, columns: int = 4, height: int = 240) -> np.ndarray:
    """Return one labelled row of evenly spaced frames per video, as one RGB picture.

    Args:
        videos: label -> file; the first decides the shape of the cells.
        columns: frames per video.
        height: of every cell (pixels).
    """
    import cv2

    cells, labels = [], []
    limit = 0
    for label, video in videos.items():
        frames = read_video(video)
        rows, width = frames.shape[1:3]
        limit = limit or round(width * height / rows)
        factor = min(height / rows, limit / width)
        for index in np.linspace(0, len(frames) - 1, columns).round().astype(int):
            size = round(width * factor), round(rows * factor)
            cells.append(cv2.resize(frames[index], size, interpolation=cv2.INTER_AREA))
        labels += [label] + [""] * (columns - 1)
    return tile(cells, columns=columns, labels=labels, gap=4, label_height=26)


def write_picture(path: Path, picture: np.ndarray) -> Path:
    """Write an RGB picture as JPEG, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_jpeg(picture, quality=92))
    return path

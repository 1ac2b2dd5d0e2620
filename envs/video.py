"""Videos and contact sheets of camera frames: H.264 that every browser plays, written atomically.

Frames are RGB ``uint8`` arrays of shape ``(H, W, 3)``, as in observations. PyAV and OpenCV are imported on use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from simtoreal.envs.errors import ConfigError, SimtorealError
from simtoreal.envs.files import atomic_path

# Visually lossless for small synthetic images, a few hundred kB for a ten-second episode.
_QUALITY = "20"


def write_video(path: Path | str, frames: Iterable[np.ndarray], fps: float, *, scale: int = 1) -> Path:
    """Write frames to an MP4 (H.264, yuv420p, playable while it downloads) and return its path.

    Args:
        path: file to create or replace; the parent folder is made when missing.
        frames: ``(H, W, 3)`` uint8 RGB, all of one size; consumed one by one, so a generator streams.
        fps: frames per second of playback.
        scale: integer enlargement with nearest-neighbour sampling, so that policy pixels stay visible as pixels.

    Odd sizes are padded by one row or column of the border pixel, because yuv420p needs even sizes.

    Raises:
        ConfigError: no frames, a wrong shape or dtype, a size that changes, or a bad ``fps`` or ``scale``.
    """
    import av

    path = Path(path)
    if not (math.isfinite(fps) and fps > 0):
        raise ConfigError(f"video {path}: fps is {fps}, expected a positive number")
    if int(scale) != scale or scale < 1:
        raise ConfigError(f"video {path}: scale is {scale}, expected an integer of at least 1")
    rate = Fraction(fps).limit_denominator(1000)
    expected: tuple[int, ...] | None = None
    # The index at the front ("faststart") lets a browser play before the file is complete.
    options = {"movflags": "faststart"}
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": _QUALITY, "preset": "veryfast"})
        stream.pix_fmt = "yuv420p"
        for index, frame in enumerate(frames):
            pixels = _check_frame(frame, f"video {path}, frame {index}")
            if expected is None:
                expected = pixels.shape
                stream.height = _even(pixels.shape[0] * scale)
                stream.width = _even(pixels.shape[1] * scale)
            elif pixels.shape != expected:
                raise ConfigError(f"video {path}, frame {index}: shape {pixels.shape}, but frame 0 has {expected}")
            enlarged = pixels.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else pixels
            bottom, right = stream.height - enlarged.shape[0], stream.width - enlarged.shape[1]
            if bottom or right:
                enlarged = np.pad(enlarged, ((0, bottom), (0, right), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(enlarged), format="rgb24")
            container.mux(stream.encode(picture))
        if expected is None:
            raise ConfigError(f"video {path}: there are no frames to write")
        container.mux(stream.encode(None))
    return path


def read_video(path: Path | str) -> np.ndarray:
    """Return all frames of a video as ``(T, H, W, 3)`` uint8 RGB.

    Raises:
        SimtorealError: the file is missing or is not a readable video.
    """
    import av

    path = Path(path)
    if not path.is_file():
        raise SimtorealError(f"video {path} does not exist")
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise SimtorealError(f"{path} is not a readable video: {error}") from error
    if not frames:
        raise SimtorealError(f"video {path} holds no frames")
    return np.stack(frames)


def tile(
    frames: Sequence[np.ndarray],
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int = 1,
    gap: int = 2,
    label_height: int = 18,
) -> np.ndarray:
    """Arrange frames in a grid, row by row, and return one RGB picture.

    Args:
        frames: ``(H, W, 3)`` uint8 each; smaller ones are centred in a cell of the largest size.
        columns: cells per row; by default the grid is about square (two frames stand side by side).
        labels: one text per frame, written in a strip above its cell.
        scale: integer enlargement of every frame (nearest neighbour); labels keep their size.
        gap: pixels between cells.
        label_height: pixels of a label's strip, which sets the size of its text.

    Raises:
        ConfigError: no frames, a wrong shape or dtype, or a number of labels that differs from the frames.
    """
    if not len(frames):
        raise ConfigError("a contact sheet needs at least one frame")
    if labels is not None and len(labels) != len(frames):
        raise ConfigError(f"a contact sheet of {len(frames)} frames got {len(labels)} labels")
    if scale < 1 or (columns is not None and columns < 1):
        raise ConfigError(f"contact sheet: scale {scale} and columns {columns} must be at least 1")
    images = [_check_frame(frame, f"contact sheet, frame {index}") for index, frame in enumerate(frames)]
    images = [image.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else image for image in images]
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    strip = label_height if labels is not None else 0
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = np.full(
        (rows * (height + strip) + (rows - 1) * gap, columns * width + (columns - 1) * gap, 3), 32, dtype=np.uint8
    )
    for index, image in enumerate(images):
        top = (index // columns) * (height + strip + gap)
        left = (index % columns) * (width + gap)
        if labels is not None:
            sheet[top : top + strip, left : left + width] = _label(labels[index], width, strip)
        y = top + strip + (height - image.shape[0]) // 2
        x = left + (width - image.shape[1]) // 2
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


def _label(text: str, width: int, height: int) -> np.ndarray:
    """Draw ``text`` into a strip, shrinking and finally cutting it to fit the width."""
    import cv2

    strip = np.full((height, width, 3), 32, dtype=np.uint8)
    font, unit = cv2.FONT_HERSHEY_SIMPLEX, height / 18
    size, smallest = 0.42 * unit, 0.32 * unit

    def length(candidate: str, candidate_size: float) -> int:
        return int(cv2.getTextSize(candidate, font, candidate_size, max(1, round(unit)))[0][0])

    while length(text, size) > width - 4 and size > smallest:
        size -= 0.02
    while len(text) > 1 and length(text, size) > width - 4:
        text = text[:-2] + "~" if len(text) > 2 else text[:1]
    cv2.putText(
        strip, text, (2, height - round(5 * unit)), font, size, (240, 240, 240), max(1, round(unit)), cv2.LINE_AA
    )
    return strip


def _check_frame(frame: np.ndarray, where: str) -> np.ndarray:
    pixels = np.asarray(frame)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ConfigError(f"{where}: shape {pixels.shape}, expected (height, width, 3)")
    if pixels.dtype != np.uint8:
        raise ConfigError(f"{where}: dtype {pixels.dtype}, expected uint8 RGB in 0..255")
    return pixels


def _even(size: int) -> int:
    return size + size % 2

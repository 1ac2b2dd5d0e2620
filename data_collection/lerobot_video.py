"""Videos as LeRobotDataset v3.0 stores them: one stream, constant rate, a key frame every two frames."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simtoreal.envs.errors import ConfigError, DatasetError

Codec = Literal["h264", "av1"]
_ENCODERS = {"h264": "libx264", "av1": "libsvtav1"}
# Random access needs tiny groups of pictures; lerobot uses 2 as well, and B-frames would reorder time stamps.
_GROUP = 2
_OPTIONS = {
    "h264": {"crf": "18", "preset": "veryfast", "g": str(_GROUP), "bf": "0"},
    "av1": {"crf": "30", "preset": "8", "g": str(_GROUP), "svtav1-params": "lp=1"},
}
_SMALLEST_AV1 = 64
_LARGEST_SIDE = 8192


def fps_fraction(fps: float) -> Fraction:
    """Frame rate as the fraction that a container stores."""
    return Fraction(fps).limit_denominator(1001)


def pixel_format(height: int, width: int) -> str:
    """``yuv420p``, or for odd sizes, which it cannot hold, ``yuv444p``."""
    return "yuv444p" if height % 2 or width % 2 else "yuv420p"


def require_encodable(codec: Codec, height: int, width: int, camera: str) -> None:
    """Raise :class:`ConfigError` if ``codec`` cannot hold images of this size."""
    import av

    if _ENCODERS[codec] not in av.codecs_available:
        raise ConfigError(f"the installed PyAV has no encoder {_ENCODERS[codec]} for --codec {codec}")
    if codec == "av1" and (min(height, width) < _SMALLEST_AV1 or pixel_format(height, width) != "yuv420p"):
        raise ConfigError(
            f"camera '{camera}' has {width} x {height} pixels; AV1 needs even sizes of at least {_SMALLEST_AV1}. "
            "Use --codec h264 or --images."
        )


def encode(path: Path, frames: np.ndarray, fps: float, codec: Codec) -> None:
    """Write frames ``(T, H, W, 3)`` uint8 RGB to the MP4 ``path``; frame t has the time t / fps.

    Raises:
        OSError: writing failed.
    """
    import av

    os.environ.setdefault("SVT_LOG", "1")  # errors only; by default it describes itself at every file
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream(_ENCODERS[codec], rate=fps_fraction(fps), options=_OPTIONS[codec])
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format(*frames.shape[1:3])
        # Several threads change nothing in the picture but cost start-up time for small images.
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def decode(path: Path, start_s: float, steps: int, fps: float, shape: tuple[int, int, int]) -> np.ndarray:
    """Read the ``steps`` frames that begin at ``start_s`` seconds as ``(steps, H, W, 3)`` uint8 RGB.

    Args:
        path: MP4 of one or many episodes.
        start_s: time of the first frame.
        steps: number of frames.
        fps: rate of the dataset.
        shape: (H, W, 3) that the dataset declares.

    Raises:
        DatasetError: not a video, of another size, or a frame is missing.
    """
    height, width, _ = shape
    frames = np.empty((steps, *shape), dtype=np.uint8)
    done = 0
    for time_s, frame in _frames_from(path, start_s - 0.5 / fps):
        if (frame.height, frame.width) != (height, width):
            raise DatasetError(f"{path}: frames are {frame.width} x {frame.height}, info.json says {width} x {height}.")
        expected = start_s + done / fps
        if time_s < expected - 0.5 / fps:
            continue
        if time_s > expected + 0.5 / fps:
            raise DatasetError(f"{path}: no frame at {expected:.4f} s (the next one is at {time_s:.4f} s).")
        frames[done] = frame.to_ndarray(format="rgb24")
        done += 1
        if done == steps:
            return frames
    raise DatasetError(f"{path}: ends after {done} of {steps} frames from {start_s:.4f} s.")


def _frames_from(path: Path, start_s: float) -> Iterator[tuple[float, Any]]:
    """Yield (seconds, frame) from the key frame before ``start_s`` on."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DatasetError(f"{path}: holds no video stream.")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise DatasetError(f"{path}: its video has an unknown codec.")
            if max(stream.codec_context.width, stream.codec_context.height) > _LARGEST_SIDE:
                raise DatasetError(f"{path}: frames are larger than {_LARGEST_SIDE} pixels.")
            if start_s > 0 and stream.time_base:
                container.seek(int(start_s / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                yield float(frame.pts * frame.time_base), frame
    except (av.FFmpegError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: is not a readable video ({error}).") from error

"""Images out of ROS messages, and into the size that a policy sees."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from simtoreal.envs.errors import RobotError

# Channel order of the encodings that drivers publish; the observation is RGB.
ENCODINGS = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0)}
CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4}


def decode_image(message: Any, topic: str) -> np.ndarray:
    """Return the RGB image ``(H, W, 3)`` uint8 in a ``sensor_msgs`` Image or CompressedImage.

    Raises:
        RobotError: unknown encoding, or the data are not as long as height, width and step say (torn).
    """
    if hasattr(message, "format"):
        import cv2

        image = None
        if message.data:
            # Sizes in a damaged header that OpenCV refuses are an exception; other damage gives None.
            with contextlib.suppress(cv2.error):
                image = cv2.imdecode(np.frombuffer(message.data, dtype=np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise RobotError(f"{topic}: {len(message.data)} bytes of '{message.format}' cannot be decoded: torn image")
        return np.ascontiguousarray(image[:, :, ::-1])
    if message.encoding not in ENCODINGS:
        raise RobotError(f"{topic}: encoding '{message.encoding}' is not one of {', '.join(ENCODINGS)}")
    channels = CHANNELS[message.encoding]
    expected = message.height * message.step
    if message.step < message.width * channels or len(message.data) != expected or expected == 0:
        raise RobotError(
            f"{topic}: {len(message.data)} bytes for {message.width}x{message.height} '{message.encoding}' "
            f"with step {message.step}: torn image"
        )
    rows = np.frombuffer(message.data, dtype=np.uint8).reshape(message.height, message.step)
    pixels = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    return np.ascontiguousarray(pixels[:, :, ENCODINGS[message.encoding]])


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre-crop to the aspect of ``(height, width)`` and shrink by area averaging; same size is passed through."""
    if image.shape[:2] == (height, width):
        return image
    import cv2

    scale = min(image.shape[0] / height, image.shape[1] / width)
    crop = round(height * scale), round(width * scale)
    top, left = (image.shape[0] - crop[0]) // 2, (image.shape[1] - crop[1]) // 2
    cropped = image[top : top + crop[0], left : left + crop[1]]
    return np.asarray(cv2.resize(cropped, (width, height), interpolation=cv2.INTER_AREA))

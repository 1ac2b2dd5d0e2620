"""Pictures for the teleoperation page: JPEG frames, strips that a style sheet animates, thumbnails of episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simtoreal.data_collection.episode import open_episode
from simtoreal.envs.errors import DatasetError

QUALITY = 85
STRIP_FRAMES = 24
STRIP_HEIGHT_PX = 96
THUMBNAIL_PX = 96


def jpeg(image: np.ndarray, quality: int = QUALITY) -> bytes:
    """Encode ``(H, W, 3)`` uint8 RGB."""
    import cv2

    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"an image of shape {image.shape} and type {image.dtype} cannot be encoded")
    return bytes(data)


def strip(images: np.ndarray) -> tuple[bytes, int]:
    """Put at most ``STRIP_FRAMES`` of the images ``(T, H, W, 3)`` side by side; returns the JPEG and their number."""
    count = min(len(images), STRIP_FRAMES)
    chosen = images[np.linspace(0, len(images) - 1, count).round().astype(int)]
    return jpeg(np.concatenate([_scaled(image, STRIP_HEIGHT_PX) for image in chosen], axis=1)), count


def thumbnail(dataset: Path, name: str) -> bytes:
    """JPEG of the first camera's last image of a stored episode.

    Args:
        dataset: folder.
        name: six digits.

    Raises:
        DatasetError: there is no such episode, or it has no images.
    """
    from simtoreal.data_collection.dataset import EPISODES

    if len(name) != 6 or not name.isdigit() or not name.isascii():
        raise DatasetError(f"'{name}' is not the name of an episode")
    with open_episode(dataset / EPISODES / f"{name}.hdf5") as file:
        for key in sorted(file["obs"]):
            if key.endswith("_image") and len(file["obs"][key]):
                return jpeg(_scaled(file["obs"][key][-1], THUMBNAIL_PX))
    raise DatasetError(f"{dataset}: episode {name} has no images")


def _scaled(image: np.ndarray, height: int) -> np.ndarray:
    import cv2

    if image.shape[0] == height:
        return image
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    shrinking = image.shape[0] > height
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)

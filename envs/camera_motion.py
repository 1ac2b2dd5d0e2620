"""Cameras in cylindrical coordinates about the point of the table that they look at."""

from __future__ import annotations

import numpy as np

from simtoreal.envs import rotation


def look_at_point(position: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Point ``(3,)`` of the table that a camera looks at."""
    forward = -matrix[:, 2]
    # A camera that does not look down has no such point; it turns about the middle of the table's near edge.
    return position + forward * (-position[2] / forward[2]) if forward[2] < -0.05 else np.array([0.3, 0.0, 0.0])


def displace_camera(position: np.ndarray, matrix: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Displace a camera in cylindrical coordinates about the vertical axis through the point of the table it looks at.

    That point stays in the centre of the image.

    Args:
        position: ``(3,)`` metres, base frame.
        matrix: ``(3, 3)`` orientation; the camera looks along its -z, +y is up in the image.
        offsets: azimuth (degrees), distance (m) and height (m).

    Returns:
        The new position and orientation.
    """
    azimuth, distance, height = offsets
    centre = look_at_point(position, matrix)
    arm = position - centre
    radius = float(np.hypot(*arm[:2]))
    turn = np.deg2rad(azimuth)
    spin = np.array([[np.cos(turn), -np.sin(turn), 0.0], [np.sin(turn), np.cos(turn), 0.0], [0.0, 0.0, 1.0]])
    scaled = np.array([*(arm[:2] * (radius + distance) / radius), arm[2] + height])
    # Pitch about the camera's own x axis that brings the centre back to the middle of the image.
    pitch = np.arctan2(arm[2], radius) - np.arctan2(scaled[2], radius + distance)
    tilt = rotation.to_matrix(rotation.from_rotation_vector(np.array([pitch, 0.0, 0.0])))
    return centre + spin @ scaled, spin @ matrix @ tilt

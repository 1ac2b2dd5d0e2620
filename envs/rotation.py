"""Quaternions ``wxyz`` and the continuous 6-D rotation (first two matrix columns), batched over leading axes."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def quaternion_multiply(a: Array, b: Array) -> Array:
    """Hamilton product of ``(..., 4)`` quaternions."""
    aw, ax, ay, az = np.moveaxis(np.asarray(a), -1, 0)
    bw, bx, by, bz = np.moveaxis(np.asarray(b), -1, 0)
    return np.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def quaternion_conjugate(q: Array) -> Array:
    """Inverse of unit quaternions ``(..., 4)``."""
    return np.asarray(q) * np.array([1.0, -1.0, -1.0, -1.0])


def from_rotation_vector(r: Array) -> Array:
    """Quaternions of rotation vectors ``(..., 3)`` in radians."""
    r = np.asarray(r, dtype=np.float64)
    angle = np.linalg.norm(r, axis=-1, keepdims=True)
    # sin(x/2)/x is 1/2 at 0; sinc keeps it exact there.
    return np.concatenate([np.cos(angle / 2), 0.5 * np.sinc(angle / (2 * np.pi)) * r], axis=-1)


def to_rotation_vector(q: Array) -> Array:
    """Rotation vectors in radians, norm at most pi, of unit quaternions ``(..., 4)``."""
    q = np.asarray(q, dtype=np.float64)
    q = np.where(q[..., :1] < 0, -q, q)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., :1])
    scale = np.where(sine > 1e-9, angle / np.maximum(sine, 1e-12), 2.0)
    return q[..., 1:] * scale


def to_matrix(q: Array) -> Array:
    """Rotation matrices ``(..., 3, 3)`` of unit quaternions ``(..., 4)``."""
    w, x, y, z = np.moveaxis(np.asarray(q), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def from_matrix(m: Array) -> Array:
    """Unit quaternions with w >= 0 of rotation matrices ``(..., 3, 3)``."""
    m = np.asarray(m, dtype=np.float64)
    # Each candidate is exact up to scale; the one with the largest norm is well conditioned (Shepperd, 1978).
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    candidates = np.stack(
        [
            np.stack([1 + xx + yy + zz, a, b, c], axis=-1),
            np.stack([a, 1 + xx - yy - zz, d, e], axis=-1),
            np.stack([b, d, 1 - xx + yy - zz, f], axis=-1),
            np.stack([c, e, f, 1 - xx - yy + zz], axis=-1),
        ],
        axis=-2,
    )
    norms = np.linalg.norm(candidates, axis=-1)
    best = np.take_along_axis(candidates, norms.argmax(-1)[..., None, None], axis=-2)[..., 0, :]
    q = best / np.linalg.norm(best, axis=-1, keepdims=True)
    return np.where(q[..., :1] < 0, -q, q)


def to_6d(q: Array) -> Array:
    """First two columns ``(..., 6)`` of the rotation matrix (Zhou et al., 2019)."""
    m = to_matrix(q)
    return np.concatenate([m[..., :, 0], m[..., :, 1]], axis=-1)


def from_6d(r: Array) -> Array:
    """Unit quaternions of 6-D rotations ``(..., 6)``, by Gram-Schmidt."""
    r = np.asarray(r, dtype=np.float64)
    x = r[..., :3] / np.maximum(np.linalg.norm(r[..., :3], axis=-1, keepdims=True), 1e-9)
    y = r[..., 3:] - (x * r[..., 3:]).sum(-1, keepdims=True) * x
    y = y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-9)
    return from_matrix(np.stack([x, y, np.cross(x, y)], axis=-1))


def yaw(q: Array) -> Array:
    """Rotation about the world z axis in radians, ``(...)``."""
    m = to_matrix(q)
    return np.arctan2(m[..., 1, 0], m[..., 0, 0])

"""One interface for every camera: the newest frame with its capture time, refused when it is old, frozen or torn."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from simtoreal.envs.errors import ConfigError, StaleObservationError
from simtoreal.robot.stream_counter import StreamCounter

FROZEN_FRAMES = 10


class FrozenCameraError(StaleObservationError):
    """A camera goes on delivering the same image."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One image of a camera.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB, read-only.
        depth_m: ``(H, W)`` float32 metres along the optical axis, aligned to the colour pixels, 0 where unknown; None
            for cameras without depth.
        capture_ns: when it was taken, ``time.monotonic_ns()`` of this computer (see
            :class:`~simtoreal.robot.stamp_clock.StampClock`).
        receive_ns: when it arrived, same clock.
        sequence: counts accepted frames, so that a reader can tell whether it has seen this one.
        identical: how many frames before this one had exactly the same pixels.
    """

    image: np.ndarray
    depth_m: np.ndarray | None = None
    capture_ns: int
    receive_ns: int
    sequence: int
    identical: int


class Camera(ABC):
    """Keeps the newest good frame of one camera; drivers offer frames from their own thread.

    Args:
        name: used in messages and as observation key ``<name>_image``.
        frozen_frames: identical images in a row, after the first, that mean the camera is frozen.

    Attributes:
        frames: counts what was accepted, and what is missing in between.
    """

    def __init__(self, name: str, *, frozen_frames: int = FROZEN_FRAMES) -> None:
        if frozen_frames < 1:
            raise ConfigError(f"frozen_frames of camera '{name}' is {frozen_frames}; expected at least 1")
        self.name = name
        self.frozen_frames = frozen_frames
        self.frames = StreamCounter()
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._problem = ""
        self._excused = 0

    @abstractmethod
    def close(self) -> None:
        """Release the device; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, max_age_s: float, *, moving: bool = True) -> Frame:
        """Return the newest frame without waiting.

        Args:
            max_age_s: oldest acceptable age since capture, seconds.
            moving: whether what the camera sees is changing. Real sensors always show noise, but a rendered still
                scene repeats exactly; repetition while False is excused.

        Raises:
            StaleObservationError: nothing yet, or too old; says why frames were refused in the meantime.
            FrozenCameraError: the image repeats although what the camera sees is changing.
        """
        with self._changed:
            frame, problem = self._newest, self._problem
        refused = f"; newer images were refused: {problem}" if problem else ""
        if frame is None:
            raise StaleObservationError(f"camera '{self.name}' has delivered no image{refused}")
        age_s = (time.monotonic_ns() - frame.capture_ns) * 1e-9
        if age_s > max_age_s:
            # Images that come in time but have old stamps.
            behind = (time.monotonic_ns() - frame.receive_ns) * 1e-9 <= max_age_s
            clock = " by its stamp although it has just come: is it late, or was its clock set?" if behind else ""
            raise StaleObservationError(
                f"newest image of camera '{self.name}' is {age_s:.2f} s old (at most {max_age_s:g} s){clock}{refused}"
            )
        self._excused = min(self._excused, frame.identical) if moving else frame.identical
        if frame.identical - self._excused >= self.frozen_frames:
            raise FrozenCameraError(
                f"camera '{self.name}' is frozen: {frame.identical + 1} identical images with advancing stamps"
            )
        return frame

    def wait(self, timeout_s: float, *, after: int = -1) -> Frame:
        """Return the first frame whose ``sequence`` is larger than ``after``, waiting for it if needed.

        Raises:
            StaleObservationError: none came within ``timeout_s`` seconds.
        """

        def arrived() -> bool:
            return self._newest is not None and self._newest.sequence > after

        with self._changed:
            if not self._changed.wait_for(arrived, timeout_s) or self._newest is None:
                reason = f": {self._problem}" if self._problem else ""
                raise StaleObservationError(f"camera '{self.name}' delivered no image within {timeout_s:g} s{reason}")
            return self._newest

    def _offer(self, image: np.ndarray, *, capture_ns: int, receive_ns: int, depth_m: np.ndarray | None = None) -> None:
        """Make an image the newest frame, unless it is out of order or of another size than before."""
        before = self._newest
        if before is not None and image.shape != before.image.shape:
            self._refuse(f"size changed from {before.image.shape[:2]} to {image.shape[:2]} (height, width)")
            return
        if before is not None and capture_ns <= before.capture_ns:
            self._refuse("its stamp is not later than that of the image before")
            return
        image.setflags(write=False)
        same = before is not None and np.array_equal(before.image, image)
        frame = Frame(
            image=image,
            depth_m=depth_m,
            capture_ns=capture_ns,
            receive_ns=receive_ns,
            sequence=0 if before is None else before.sequence + 1,
            identical=before.identical + 1 if before is not None and same else 0,
        )
        self.frames.note(capture_ns)
        with self._changed:
            self._newest, self._problem = frame, ""
            self._changed.notify_all()

    def _refuse(self, reason: str) -> None:
        """Note why an image was dropped; :meth:`read` tells once the last good one is too old."""
        with self._changed:
            self._problem = reason

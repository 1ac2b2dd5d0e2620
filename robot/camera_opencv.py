"""Cameras that OpenCV can open: V4L2 devices, network streams, and video files played at their own pace."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from simtoreal.envs.errors import ConfigError, RobotError
from simtoreal.robot.camera import FROZEN_FRAMES, Camera

# Pause between attempts while an unplugged device returns at once without a frame.
IDLE_S = 0.02


class OpenCvCamera(Camera):
    """Frames of ``cv2.VideoCapture``, read by a thread of its own so that none waits in the driver's queue.

    Args:
        name: name of the camera.
        source: index of a device (``/dev/video<index>``), or path or URL of a stream. A file is played in real time,
            once, like a camera that is then unplugged.
        width, height: size to ask a device for in pixels; None leaves the driver's choice.
        fps: rate to ask a device for; None leaves the driver's choice.
        frozen_frames: see :class:`~simtoreal.robot.camera.Camera`.

    Raises:
        RobotError: the source cannot be opened.
        ConfigError: the file does not exist.
    """

    def __init__(
        self,
        name: str,
        source: int | str | Path,
        *,
        width: int | None = None,
        height: int | None = None,
        fps: float | None = None,
        frozen_frames: int = FROZEN_FRAMES,
    ) -> None:
        super().__init__(name, frozen_frames=frozen_frames)
        import cv2

        self._is_device = isinstance(source, int)
        self._is_file = not self._is_device and "://" not in str(source)
        if self._is_file and not Path(source).exists():
            raise ConfigError(f"camera '{name}': there is no file {source}")
        self._capture: Any = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            raise RobotError(
                f"camera '{name}': OpenCV cannot open {source}. Is it connected, unused by others, and readable "
                "(ls -l /dev/video*; member of the group video)?"
            )
        # The driver's queue only adds delay: the newest frame is what counts.
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        for option, value in (
            (cv2.CAP_PROP_FRAME_WIDTH, width),
            (cv2.CAP_PROP_FRAME_HEIGHT, height),
            (cv2.CAP_PROP_FPS, fps),
        ):
            if self._is_device and value is not None:
                self._capture.set(option, value)
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self._period_ns = round(1e9 / rate) if self._is_file and rate > 0 else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera_{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import cv2

        due = time.monotonic_ns()
        while not self._stop.is_set():
            if self._period_ns:
                self._stop.wait(max(0, due - time.monotonic_ns()) * 1e-9)
                due += self._period_ns
            if not self._capture.grab():
                self._refuse("the video ended" if self._is_file else "the driver delivers no frame")
                if self._is_file:
                    return
                self._stop.wait(IDLE_S)
                continue
            arrived = time.monotonic_ns()
            captured = self._captured(arrived)
            decoded, image = self._capture.retrieve()
            if not decoded or image is None or image.ndim != 3 or image.shape[2] != 3:
                self._refuse("a frame could not be decoded: torn image")
                continue
            self._offer(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), capture_ns=captured, receive_ns=arrived)

    def _captured(self, arrived: int) -> int:
        """Monotonic capture time: V4L2 stamps its buffers with the monotonic clock, others do not stamp at all."""
        import cv2

        if self._is_device:
            stamp = round(self._capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
            if 0 <= arrived - stamp < 1_000_000_000:
                return stamp
        return arrived

    def close(self) -> None:
        """See :class:`~simtoreal.robot.camera.Camera`."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            self._capture.release()

"""Intel RealSense cameras through pyrealsense2: colour, and depth aligned to it."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from simtoreal.envs.errors import ConfigError, RobotError, closest, require
from simtoreal.robot.camera import FROZEN_FRAMES, Camera
from simtoreal.robot.stamp_clock import StampClock

QUEUE_FRAMES = 4
POLL_MS = 100


class RealSenseCamera(Camera):
    """Colour frames of a RealSense device, with depth aligned to them if asked for.

    The sensors are streamed directly instead of through ``rs.pipeline``, which hides the device and cannot stream
    the SDK's own ``software_device``; colour and depth are paired by their stamps.

    Args:
        name: name of the camera.
        serial: serial number; None takes the only connected device.
        width, height: pixels of both streams.
        fps: frames per second of both streams.
        depth: whether frames carry ``depth_m``.
        device: an ``rs.device`` to use instead of searching for one.
        frozen_frames: see :class:`~simtoreal.robot.camera.Camera`.

    Raises:
        MissingDependencyError: pyrealsense2 or libusb is not installed.
        RobotError: no such device, or it cannot be streamed.
        ConfigError: the device has no stream of this size and rate.
    """

    def __init__(
        self,
        name: str,
        *,
        serial: str | None = None,
        width: int = 640,
        height: int = 480,
        fps: int = 30,
        depth: bool = False,
        device: Any = None,
        frozen_frames: int = FROZEN_FRAMES,
    ) -> None:
        super().__init__(name, frozen_frames=frozen_frames)
        self._rs: Any = require("pyrealsense2", "realsense")
        rs = self._rs
        self._device = device if device is not None else find_device(rs, serial)
        wanted = {rs.stream.color: rs.format.rgb8}
        if depth:
            wanted[rs.stream.depth] = rs.format.z16
        self._wanted = tuple(wanted)
        self._half_period_ms = 500.0 / fps
        self._clock = StampClock()
        self._queue = rs.frame_queue(QUEUE_FRAMES)
        self._align = _Aligner(rs) if depth else None
        self._sensors: list[Any] = []
        self._stop = threading.Event()
        try:
            self._start(find_profiles(rs, self._device, wanted, width, height, fps))
        except RuntimeError as error:
            self._stop_sensors()
            raise RobotError(f"camera '{name}': the RealSense device cannot be streamed: {error}") from error
        self._thread = threading.Thread(target=self._run, name=f"camera_{name}", daemon=True)
        self._thread.start()

    def _start(self, profiles: dict[int, tuple[Any, list[Any]]]) -> None:
        for sensor, chosen in profiles.values():
            # Stamps of different sensors are comparable only on the common clock that the SDK estimates.
            if sensor.supports(self._rs.option.global_time_enabled):
                sensor.set_option(self._rs.option.global_time_enabled, 1)
            sensor.open(chosen)
            sensor.start(self._queue)
            self._sensors.append(sensor)

    def _run(self) -> None:
        waiting: dict[Any, Any] = {}
        while not self._stop.is_set():
            there, frame = self._queue.try_wait_for_frame(POLL_MS)
            if not there:
                continue
            arrived = time.monotonic_ns()
            waiting[frame.get_profile().stream_type()] = frame
            if len(waiting) < len(self._wanted):
                continue
            stamps = [other.get_timestamp() for other in waiting.values()]
            if max(stamps) - min(stamps) > self._half_period_ms:
                # The older one has lost its partner; the newer one still waits for its own.
                self._refuse(f"colour and depth are {max(stamps) - min(stamps):.0f} ms apart")
                waiting = {kind: other for kind, other in waiting.items() if other.get_timestamp() == max(stamps)}
                continue
            self._deliver(waiting, arrived)
            waiting = {}

    def _deliver(self, frames: dict[Any, Any], arrived: int) -> None:
        color = frames[self._rs.stream.color]
        stamp = round(color.get_timestamp() * 1e6)
        depth_m = None
        try:
            if self._align is not None:
                color, depth_m = self._align(color, frames[self._rs.stream.depth])
            image = np.array(color.get_data(), dtype=np.uint8)
        except RuntimeError as error:
            self._refuse(f"the SDK could not decode or align a frame: {error}")
            return
        captured = self._clock.to_monotonic(stamp, arrived)
        self._offer(image, capture_ns=captured, receive_ns=arrived, depth_m=depth_m)

    def _stop_sensors(self) -> None:
        while self._sensors:
            sensor = self._sensors.pop()
            sensor.stop()
            sensor.close()

    def close(self) -> None:
        """See :class:`~simtoreal.robot.camera.Camera`."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        self._stop_sensors()


class _Aligner:
    """Projects depth onto the colour pixels with the SDK's own ``rs.align``, which wants both frames as one set."""

    def __init__(self, rs: Any) -> None:
        self._pair: list[Any] = []
        self._sets = rs.frame_queue(1)
        self._block = rs.processing_block(
            lambda frame, source: source.frame_ready(source.allocate_composite_frame(self._pair))
        )
        self._block.start(self._sets)
        self._align = rs.align(rs.stream.color)

    def __call__(self, color: Any, depth: Any) -> tuple[Any, np.ndarray]:
        """Return the colour frame and depth ``(H, W)`` float32 in metres, 0 where unknown."""
        self._pair = [depth, color]
        self._block.invoke(color)
        aligned = self._align.process(self._sets.wait_for_frame(1000).as_frameset())
        self._pair = []
        depth_frame = aligned.get_depth_frame()
        metres = np.array(depth_frame.get_data(), dtype=np.float32) * np.float32(depth_frame.get_units())
        metres.setflags(write=False)
        return aligned.get_color_frame(), metres


def find_device(rs: Any, serial: str | None) -> Any:
    """Return the connected device with this serial number, or the only one.

    Raises:
        RobotError: there is none, or several and no serial number was given.
    """
    found = {device.get_info(rs.camera_info.serial_number): device for device in rs.context().query_devices()}
    if not found:
        raise RobotError(
            "no RealSense camera is connected. Check the USB 3 cable and the udev rules (`rs-enumerate-devices`)."
        )
    if serial is None:
        if len(found) > 1:
            raise RobotError(f"{len(found)} RealSense cameras are connected; name one by serial: {', '.join(found)}")
        return next(iter(found.values()))
    if serial not in found:
        raise RobotError(f"no RealSense camera has the serial number '{serial}'. {closest(serial, found)}")
    return found[serial]


def find_profiles(
    rs: Any, device: Any, wanted: dict[Any, Any], width: int, height: int, fps: int
) -> dict[int, tuple[Any, list[Any]]]:
    """Return, per sensor, the stream profiles to open.

    Args:
        rs: the module ``pyrealsense2``.
        device: the device.
        wanted: stream type -> pixel format.
        width, height, fps: of every stream.

    Raises:
        ConfigError: the device has no such stream; lists what it has.
    """
    chosen: dict[int, tuple[Any, list[Any]]] = {}
    for kind, pixel_format in wanted.items():
        offered = []
        for index, sensor in enumerate(device.query_sensors()):
            for profile in sensor.get_stream_profiles():
                if profile.stream_type() != kind or not profile.is_video_stream_profile():
                    continue
                video = profile.as_video_stream_profile()
                size = f"{video.width()}x{video.height()} at {profile.fps()} Hz"
                offered.append(size)
                if size == f"{width}x{height} at {fps} Hz" and profile.format() == pixel_format:
                    chosen.setdefault(index, (sensor, []))[1].append(profile)
                    break
            else:
                continue
            break
        else:
            listed = ", ".join(dict.fromkeys(offered)) or "none"
            raise ConfigError(
                f"the RealSense camera has no {str(kind).removeprefix('stream.')} stream of {width}x{height} at "
                f"{fps} Hz as {str(pixel_format).removeprefix('format.')}. It offers: {listed}."
            )
    return chosen

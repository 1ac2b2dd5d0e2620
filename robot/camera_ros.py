"""Cameras behind ROS 2 image topics, raw or compressed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from simtoreal.envs.errors import RobotError
from simtoreal.robot.camera import FROZEN_FRAMES, Camera
from simtoreal.robot.images import decode_image
from simtoreal.robot.stamp_clock import StampClock
from simtoreal.robot.topics import Topic

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class RosCamera(Camera):
    """Newest image of a ``sensor_msgs`` Image or CompressedImage topic.

    Args:
        name: name of the camera.
        node: ``rclpy`` node that subscribes; whoever owns it spins it.
        topic: name, type and quality of service.
        frozen_frames: see :class:`~simtoreal.robot.camera.Camera`.

    Raises:
        MissingDependencyError: the message package is not installed.
    """

    def __init__(self, name: str, node: Any, topic: Topic, *, frozen_frames: int = FROZEN_FRAMES) -> None:
        super().__init__(name, frozen_frames=frozen_frames)
        self._node, self._topic, self._clock = node, topic, StampClock()
        self._subscription = node.create_subscription(topic.message_class(), topic.name, self._receive, topic.qos())

    def _receive(self, message: Any) -> None:
        arrived = time.monotonic_ns()
        stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        if stamp == 0:
            self._refuse(f"{self._topic.name} carries no capture stamp (header.stamp is zero)")
            return
        try:
            image = decode_message(message, self._topic.name)
        except RobotError as error:
            self._refuse(str(error))
            return
        self._offer(image, capture_ns=self._clock.to_monotonic(stamp, arrived), receive_ns=arrived)

    def close(self) -> None:
        """See :class:`~simtoreal.robot.camera.Camera`."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None


def decode_message(message: Any, topic: str) -> np.ndarray:
    """Return the RGB image ``(H, W, 3)`` uint8 in a message, refusing files that end early.

    Decoders fill the missing part of a cut JPEG with grey and report success, so its end marker is checked.

    Raises:
        RobotError: torn, or of an unknown encoding.
    """
    if hasattr(message, "format"):
        data = bytes(message.data)
        cut_jpeg = data.startswith(JPEG_START) and not data.rstrip(b"\0").endswith(JPEG_END)
        cut_png = data.startswith(PNG_START) and not data.endswith(PNG_END)
        if cut_jpeg or cut_png:
            raise RobotError(f"{topic}: {len(data)} bytes of '{message.format}' end early: torn image")
    return decode_image(message, topic)

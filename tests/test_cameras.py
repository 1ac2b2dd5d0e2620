"""Cameras on the real thing each: DDS, the RealSense SDK, OpenCV's decoder on a video file."""

from __future__ import annotations

import contextlib
import threading
import time

import cv2
import numpy as np
import pytest

from simtoreal.envs.errors import ConfigError, RobotError, StaleObservationError
from simtoreal.robot.camera import Camera
from simtoreal.robot.camera_opencv import OpenCvCamera
from simtoreal.robot.stamp_clock import StampClock
from simtoreal.robot.topics import Topic, start_ros

MS = 1_000_000


class HandFed(Camera):
    """The interface without a device: the test offers the frames."""

    def offer(self, value: int, *, age_s: float = 0.0, size: tuple[int, int] = (4, 6)) -> None:
        now = time.monotonic_ns()
        image = np.full((*size, 3), value, dtype=np.uint8)
        self._offer(image, capture_ns=now - int(age_s * 1e9), receive_ns=now)

    def close(self) -> None:
        """Nothing to release."""


def test_newest_frame_is_returned_with_its_times():
    camera = HandFed("front")
    camera.offer(1)
    camera.offer(2)
    frame = camera.read(10.0)
    assert (frame.image == 2).all()
    assert (frame.sequence, frame.identical, frame.depth_m) == (1, 0, None)
    assert frame.capture_ns <= frame.receive_ns <= time.monotonic_ns()
    with pytest.raises(ValueError, match="read-only"):
        frame.image[0] = 0


def test_silent_camera_is_stale():
    camera = HandFed("front")
    with pytest.raises(StaleObservationError, match="'front' has delivered no image"):
        camera.read(10.0)
    with pytest.raises(StaleObservationError, match=r"no image within 0\.05 s"):
        camera.wait(0.05)


def test_old_image_is_refused():
    camera = HandFed("front")
    camera.offer(1, age_s=0.5)
    assert camera.read(10.0).sequence == 0
    with pytest.raises(StaleObservationError, match=r"0\.5\d s old \(at most 0\.2 s\)"):
        camera.read(0.2)


def test_frozen_image_is_noticed_and_recovers():
    camera = HandFed("front", frozen_frames=3)
    for _ in range(3):
        camera.offer(7)
    assert camera.read(10.0).identical == 2
    camera.offer(7)
    with pytest.raises(StaleObservationError, match="frozen: 4 identical images"):
        camera.read(10.0)
    camera.offer(8)
    assert camera.read(10.0).identical == 0


def test_still_scene_is_excused_until_something_moves():
    camera = HandFed("front", frozen_frames=3)
    for _ in range(9):
        camera.offer(7)
    assert camera.read(10.0, moving=False).identical == 8
    camera.offer(7)
    assert camera.read(10.0).identical == 9
    camera.offer(7)
    camera.offer(7)
    with pytest.raises(StaleObservationError, match="frozen"):
        camera.read(10.0)


def test_images_out_of_order_or_of_another_size_are_dropped_and_named():
    camera = HandFed("front")
    camera.offer(1)
    camera.offer(2, age_s=0.2)
    assert (camera.read(10.0).image == 1).all()
    camera.offer(3, size=(8, 8))
    time.sleep(0.05)
    with pytest.raises(StaleObservationError, match=r"size changed from \(4, 6\) to \(8, 8\)"):
        camera.read(0.04)


def test_frozen_frames_must_be_positive():
    with pytest.raises(ConfigError, match="frozen_frames of camera 'front' is 0"):
        HandFed("front", frozen_frames=0)


def test_stamps_of_another_clock_become_monotonic_and_a_growing_delay_shows():
    clock = StampClock()
    stamp, arrival = 5_000_000_000_000, 1_000_000_000
    assert clock.to_monotonic(stamp, arrival) == arrival
    # 30 ms faster than the first: that one is the new zero of the delay.
    assert clock.to_monotonic(stamp + 100 * MS, arrival + 70 * MS) == arrival + 70 * MS
    # 230 ms late, seen as such up to the drift allowed to the clocks.
    captured = clock.to_monotonic(stamp + 200 * MS, arrival + 400 * MS)
    assert arrival + 170 * MS <= captured <= arrival + 171 * MS


@pytest.mark.parametrize("back_ms", [80, 300, 2000, 3_600_000])
@pytest.mark.parametrize("late_ms", [0, 400])
def test_a_clock_that_is_set_back_changes_no_age_and_a_queue_does_not_look_like_one(back_ms, late_ms):
    clock, ages = StampClock(), []
    for index in range(300):
        taken = (1_000 + 10 * index) * MS
        # From then on everything waits in a queue; only its growth shows, as a pause.
        arrival = taken + (0 if index < 100 else late_ms) * MS
        set_back = 0 if index < 200 else back_ms
        # No two measurements are taken at the same nanosecond.
        ages.append(arrival - clock.to_monotonic(taken + (50_000 - set_back) * MS + index, arrival))
    assert max(ages[:100]) == 0
    # Late is late, up to the drift allowed to the clocks, before and after the other clock was set.
    np.testing.assert_allclose(np.array(ages[100:]) / MS, late_ms, atol=1.0)


def test_a_clock_that_is_set_forward_and_corrected_is_followed_at_once():
    clock = StampClock()
    for index in range(300):
        arrival = (1_000 + 10 * index) * MS
        ahead = 300 if 100 <= index < 200 else 0
        assert arrival - clock.to_monotonic(arrival + (5_000 + ahead) * MS + index, arrival) < MS


@pytest.mark.parametrize("images", [2, 3, 30, 300])
def test_old_images_that_are_sent_again_and_again_grow_old(images):
    clock = StampClock()
    for index in range(30, 900):
        arrival = (1_000 + 33 * index) * MS
        newest = images + 29
        shown = index if index <= newest else 30 + (index - newest - 1) % images
        age = arrival - clock.to_monotonic((1_000 + 33 * shown) * MS + shown, arrival)
    assert age >= 33 * (900 - newest - 2) * MS


def test_an_image_with_an_old_stamp_that_has_just_come_makes_its_clock_suspect():
    camera = HandFed("front")
    camera.offer(1, age_s=0.5)
    with pytest.raises(StaleObservationError, match=r"0\.5\d s old .*although it has just come.*was its clock set"):
        camera.read(0.2)


@pytest.fixture
def video(tmp_path):
    """A losslessly coded 30 Hz video of 30 grey frames, brighter by 8 each."""
    path = tmp_path / "grey.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30.0, (32, 24))
    for index in range(30):
        image = np.full((24, 32, 3), 8 * index, dtype=np.uint8)
        image[:, :16] = (0, 0, 255)  # BGR: the left half is red
        writer.write(image)
    writer.release()
    return path


def test_video_file_is_played_like_a_camera(video):
    with OpenCvCamera("front", video) as camera:
        first = camera.wait(5.0)
        assert first.image.shape == (24, 32, 3)
        assert first.image[12, 4, 0] > 200 > 60 > first.image[12, 4, 2]
        frame = first
        while frame.sequence < 9:
            frame = camera.wait(5.0, after=frame.sequence)
        # Nine periods of 1/30 s lie between the first and the tenth frame, however late the reader is.
        assert frame.capture_ns - first.capture_ns > 200 * MS
        assert abs(int(frame.image[12, 28, 0]) - 8 * frame.sequence) <= 3


def test_end_of_the_video_makes_the_camera_stale(video):
    with OpenCvCamera("front", video) as camera:
        frame = camera.wait(5.0)
        while frame.sequence < 29:
            frame = camera.wait(5.0, after=frame.sequence)
        camera._thread.join(5.0)
        time.sleep(0.05)
        with pytest.raises(StaleObservationError, match="the video ended"):
            camera.read(0.04)


def test_opencv_names_what_it_cannot_open(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*none\.mp4"):
        OpenCvCamera("front", tmp_path / "none.mp4")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(RobotError, match=r"OpenCV cannot open .*broken\.mp4"):
        OpenCvCamera("front", broken)


class RosCameraRig:
    """A publisher and a camera on one image topic, in one process over real DDS."""

    def __init__(self, message_type: str, **options) -> None:
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node

        from simtoreal.robot.camera_ros import RosCamera

        topic = Topic(name="/front/image", type=f"sensor_msgs/msg/{message_type}", reliability="reliable", depth=5)
        self.context = start_ros()
        self.node = Node("camera_rig", context=self.context)
        self.camera = RosCamera("front", self.node, topic, **options)
        self.message_class = topic.message_class()
        self.publisher = self.node.create_publisher(self.message_class, topic.name, topic.qos())
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.stamp_ns = 1_700_000_000_000_000_000
        self.thread = threading.Thread(target=self._spin, daemon=True)
        self.thread.start()

    def _spin(self) -> None:
        from rclpy.executors import ExternalShutdownException

        with contextlib.suppress(ExternalShutdownException):
            self.executor.spin()

    def publish(self, *, stamp: bool = True, **fields) -> None:
        """Publish a message stamped 10 ms after the one before."""
        message = self.message_class(**fields)
        self.stamp_ns += 10 * MS
        if stamp:
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(self.stamp_ns, 1_000_000_000)
        self.publisher.publish(message)

    def publish_raw(self, image: np.ndarray, encoding: str = "rgb8", **fields) -> None:
        height, width, channels = image.shape
        options = {"height": height, "width": width, "step": width * channels, "data": image.tobytes(), **fields}
        self.publish(encoding=encoding, **options)

    def refusal(self) -> str:
        """Wait until the camera has refused an image and return why."""
        deadline = time.monotonic() + 5.0
        while not self.camera._problem and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.camera._problem

    def close(self) -> None:
        self.camera.close()
        self.context.shutdown()
        self.thread.join(5.0)
        self.executor.shutdown()


@pytest.fixture
def raw_rig():
    rig = RosCameraRig("Image", frozen_frames=3)
    yield rig
    rig.close()


@pytest.fixture
def compressed_rig():
    rig = RosCameraRig("CompressedImage")
    yield rig
    rig.close()


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8"])
def test_raw_topic_arrives_as_rgb(raw_rig, encoding):
    image = picture()
    sent = image[:, :, ::-1] if encoding.startswith("bgr") else image
    if "a" in encoding:
        sent = np.concatenate([sent, np.full((12, 16, 1), 255, np.uint8)], axis=2)
    raw_rig.publish_raw(sent, encoding)
    np.testing.assert_array_equal(raw_rig.camera.wait(5.0).image, image)


def test_padded_rows_are_understood(raw_rig):
    image = picture()
    padded = np.concatenate([image.reshape(12, 48), np.zeros((12, 8), np.uint8)], axis=1)
    raw_rig.publish_raw(image, step=56, data=padded.tobytes())
    np.testing.assert_array_equal(raw_rig.camera.wait(5.0).image, image)


def test_torn_raw_image_is_refused(raw_rig):
    raw_rig.publish_raw(picture(), data=picture().tobytes()[:-100])
    assert "476 bytes for 16x12 'rgb8' with step 48: torn image" in raw_rig.refusal()
    with pytest.raises(StaleObservationError, match="torn image"):
        raw_rig.camera.read(10.0)


def test_unknown_encoding_and_missing_stamp_are_refused(raw_rig):
    raw_rig.publish_raw(picture(), "yuv422")
    assert "'yuv422' is not one of rgb8" in raw_rig.refusal()
    raw_rig.camera._problem = ""
    raw_rig.publish_raw(picture(), stamp=False)
    assert "carries no capture stamp" in raw_rig.refusal()


def test_frozen_topic_is_noticed(raw_rig):
    frame_number = -1
    for _ in range(4):
        raw_rig.publish_raw(picture())
        frame_number = raw_rig.camera.wait(5.0, after=frame_number).sequence
    with pytest.raises(StaleObservationError, match="frozen"):
        raw_rig.camera.read(5.0)


def test_repeated_stamp_is_refused(raw_rig):
    raw_rig.publish_raw(picture())
    raw_rig.camera.wait(5.0)
    raw_rig.stamp_ns -= 10 * MS
    raw_rig.publish_raw(picture() // 2)
    assert "not later" in raw_rig.refusal()
    assert (raw_rig.camera.read(5.0).image == picture()).all()


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_compressed_topic_and_cut_files(compressed_rig, extension):
    smooth = cv2.resize(picture(), (160, 120), interpolation=cv2.INTER_CUBIC)
    _, encoded = cv2.imencode(f".{extension}", smooth[:, :, ::-1])
    compressed_rig.publish(format=extension, data=encoded.tobytes()[: len(encoded) * 2 // 3])
    assert "end early: torn image" in compressed_rig.refusal()
    compressed_rig.publish(format=extension, data=encoded.tobytes())
    image = compressed_rig.camera.wait(5.0).image
    assert np.abs(image.astype(int) - smooth).mean() < 4


def test_compressed_garbage_is_refused(compressed_rig):
    compressed_rig.publish(format="jpeg", data=b"no image at all")
    assert "cannot be decoded" in compressed_rig.refusal()


class SoftwareRealSense:
    """A device of the RealSense SDK itself, whose frames the test provides."""

    width, height, fps = 64, 48, 30

    def __init__(self) -> None:
        self.rs = rs = pytest.importorskip("pyrealsense2")
        self.device = rs.software_device()
        self.color_sensor = self.device.add_sensor("RGB Camera")
        self.depth_sensor = self.device.add_sensor("Stereo Module")
        self.color = self.color_sensor.add_video_stream(self._stream(rs.stream.color, 1, rs.format.rgb8, 3))
        self.depth = self.depth_sensor.add_video_stream(self._stream(rs.stream.depth, 0, rs.format.z16, 2))
        extrinsics = rs.extrinsics()
        extrinsics.rotation, extrinsics.translation = [1, 0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0]
        self.depth.register_extrinsics_to(self.color, extrinsics)
        self.number = 0
        self._alive: list[np.ndarray] = []  # the SDK keeps pointers to the pixels

    def _stream(self, kind, uid, pixel_format, bytes_per_pixel):
        intrinsics = self.rs.intrinsics()
        intrinsics.width, intrinsics.height = self.width, self.height
        intrinsics.ppx, intrinsics.ppy, intrinsics.fx, intrinsics.fy = 32, 24, 60, 60
        intrinsics.model, intrinsics.coeffs = self.rs.distortion.none, [0] * 5
        stream = self.rs.video_stream()
        stream.type, stream.index, stream.uid, stream.fmt = kind, 0, uid, pixel_format
        stream.width, stream.height, stream.fps, stream.bpp = self.width, self.height, self.fps, bytes_per_pixel
        stream.intrinsics = intrinsics
        return stream

    def _send(self, sensor, profile, pixels: np.ndarray, stamp_ms: float, bytes_per_pixel: int) -> None:
        self._alive.append(pixels)
        frame = self.rs.software_video_frame()
        frame.pixels, frame.stride, frame.bpp = pixels, self.width * bytes_per_pixel, bytes_per_pixel
        frame.timestamp, frame.domain = stamp_ms, self.rs.timestamp_domain.global_time
        frame.frame_number, frame.profile = self.number, profile.as_video_stream_profile()
        if bytes_per_pixel == 2:
            frame.depth_units = 0.001
        sensor.on_video_frame(frame)

    def send_color(self, value: int, stamp_ms: float) -> None:
        self.number += 1
        pixels = np.full((self.height, self.width, 3), (value, 0, 0), dtype=np.uint8)
        self._send(self.color_sensor, self.color, pixels, stamp_ms, 3)

    def send_depth(self, millimetres: int, stamp_ms: float) -> None:
        pixels = np.full((self.height, self.width), millimetres, dtype=np.uint16)
        self._send(self.depth_sensor, self.depth, pixels, stamp_ms, 2)

    def camera(self, **options):
        from simtoreal.robot.camera_realsense import RealSenseCamera

        size = {"width": self.width, "height": self.height, "fps": self.fps}
        return RealSenseCamera("front", device=self.device, **{**size, **options})


@pytest.fixture
def realsense():
    return SoftwareRealSense()


def test_realsense_color(realsense):
    with realsense.camera() as camera:
        realsense.send_color(100, 1000.0)
        frame = camera.wait(5.0)
        assert frame.image.shape == (48, 64, 3)
        assert frame.image[0, 0].tolist() == [100, 0, 0]
        assert frame.depth_m is None
        realsense.send_color(110, 1033.3)
        later = camera.wait(5.0, after=frame.sequence)
        assert frame.capture_ns < later.capture_ns <= later.receive_ns


def test_realsense_depth_is_aligned_and_in_metres(realsense):
    with realsense.camera(depth=True) as camera:
        realsense.send_depth(750, 1000.0)
        realsense.send_color(100, 1000.5)
        frame = camera.wait(5.0)
        assert frame.depth_m.shape == (48, 64)
        assert frame.depth_m.dtype == np.float32
        # Projection leaves small holes where rounding skips a pixel.
        known = frame.depth_m > 0
        assert known.mean() > 0.9
        np.testing.assert_allclose(frame.depth_m[known], 0.75, atol=1e-6)


def test_realsense_frames_of_different_times_are_not_paired(realsense):
    with realsense.camera(depth=True) as camera:
        realsense.send_depth(500, 1000.0)
        realsense.send_color(50, 1033.3)
        realsense.send_depth(750, 1033.3)
        frame = camera.wait(5.0)
        assert frame.image[0, 0, 0] == 50
        np.testing.assert_allclose(frame.depth_m[20, 20], 0.75, atol=1e-6)


def test_realsense_errors_list_what_there_is(realsense):
    with pytest.raises(ConfigError, match=r"no color stream of 1280x720 at 30 Hz as rgb8\. It offers: 64x48 at 30 Hz"):
        realsense.camera(width=1280, height=720)


def test_realsense_device_must_exist():
    rs = pytest.importorskip("pyrealsense2")
    from simtoreal.robot.camera_realsense import find_device

    if len(rs.context().query_devices()):
        pytest.skip("a RealSense camera is connected")
    with pytest.raises(RobotError, match="no RealSense camera is connected"):
        find_device(rs, None)

"""Recording a run to MCAP and turning it into a dataset: real DDS, real files, killed recorders, damaged bags."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from simtoreal import cli
from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs import load_task, panda_embodiment
from simtoreal.envs.errors import ConfigError, DatasetError, RobotError
from simtoreal.envs.rollout import EpisodeResult
from simtoreal.robot.bag_import import Description, import_recording, read_description
from simtoreal.robot.bag_reader import BagReader
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.recording import MARKS_TOPIC, METADATA, RunRecorder, message_definition, recorded_topics
from simtoreal.robot.resampling import Track
from simtoreal.robot.topics import load_robot_config, start_ros

MS = 1_000_000
BEGIN = 1_800_000_000_000_000_000
ROBOT = load_robot_config()
EMBODIMENT = panda_embodiment(32)
TASK = load_task("reach").to_dict()
HOME = np.array(EMBODIMENT.home_joint_positions_rad)
TRUTH = {"object_state": [0.5, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0]}


def stamped(nanoseconds: int, **content) -> dict:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return {"header": {"stamp": {"sec": seconds, "nanosec": rest}, "frame_id": ROBOT.base_frame}, **content}


def joint_state(nanoseconds: int, arm: np.ndarray, opening: float = 1.0) -> dict:
    fingers = [opening * ROBOT.finger_open] * 2
    # Permuted on purpose: joints are known by name.
    names = [*ROBOT.finger_joint_names, *ROBOT.joint_names]
    return stamped(nanoseconds, name=names, position=[*fingers, *arm.tolist()], velocity=[], effort=[])


def pose(nanoseconds: int, position: np.ndarray, quaternion: np.ndarray) -> dict:
    w, x, y, z = quaternion.tolist()
    content = {
        "position": dict(zip("xyz", position.tolist(), strict=True)),
        "orientation": {"x": x, "y": y, "z": z, "w": w},
    }
    return stamped(nanoseconds, pose=content)


def image(nanoseconds: int, value: int, size: int = 32) -> dict:
    pixels = np.full((size, size, 3), value, np.uint8)
    fields = {"height": size, "width": size, "encoding": "rgb8", "is_bigendian": 0, "step": 3 * size}
    return stamped(nanoseconds, **fields, data=pixels.tobytes())


class Bag:
    """Writes a bag with the library that other programs use, message by message at times of the test's choice."""

    def __init__(self, path: Path, *, described: bool = True) -> None:
        from mcap_ros2.writer import Writer

        self.path = path
        self.stream = open(path, "wb")  # noqa: SIM115 - closed by close
        self.writer = Writer(self.stream, chunk_size=8192)
        if described:
            self.writer.add_metadata(METADATA, description_text())
        self.schemas: dict[str, object] = {}

    def add(self, topic: str, kind: str, content: dict, at_ns: int) -> None:
        if kind not in self.schemas:
            import importlib

            package, _, name = kind.split("/")
            message_class = getattr(importlib.import_module(f"{package}.msg"), name)
            self.schemas[kind] = self.writer.register_msgdef(kind, message_definition(message_class))
        self.writer.write_message(topic, self.schemas[kind], content, log_time=at_ns, publish_time=at_ns)

    def mark(self, at_ns: int, event: str, **content) -> None:
        self.text(MARKS_TOPIC, at_ns, {"event": event, **content})

    def text(self, topic: str, at_ns: int, content: dict) -> None:
        self.add(topic, "std_msgs/msg/String", {"data": json.dumps(content)}, at_ns)

    def close(self) -> Path:
        self.writer.finish()
        self.stream.close()
        return self.path


def description_text() -> dict[str, str]:
    import dataclasses

    return {
        "embodiment": json.dumps(EMBODIMENT.to_dict()),
        "robot": json.dumps(dataclasses.asdict(ROBOT)),
        "task": json.dumps(TASK),
        "source": "twin",
        "operator": "diffusion",
        "provenance": json.dumps({"commit": "abc", "versions": {"mujoco": "3.17.0"}}),
    }


SPEED_M_S = 0.2
DURATION_S = 1.0


def write_run(
    path: Path,
    *,
    described: bool = True,
    marked: bool = True,
    episodes: int = 1,
    robot_clock_ns: int = 0,
    robot_clock_set_ns: int = 0,
    recorder_clock_set_ns: int = 0,
    without: str = "",
    blackout: str = "",
    blackout_s: tuple[float, float] = (2.0, 2.0),
) -> Path:
    """Write episodes in which the target moves along +y at 0.2 m/s, joint 1 turns, and images count up.

    Args:
        robot_clock_ns: how far the clock of the robot's computer is ahead of the recorder's.
        robot_clock_set_ns, recorder_clock_set_ns: by how much one or the other clock is set before the second episode.
        without: name of a topic to leave out.
        blackout, blackout_s: name of a topic, and the interval of each episode in which it is silent.
    """
    bag = Bag(path, described=described)
    topics = ROBOT.topics
    position, quaternion = Kinematics(EMBODIMENT).forward(HOME)

    def add(topic, at_ns: int, content: dict) -> None:
        silent = topic.name == blackout and blackout_s[0] <= seconds <= blackout_s[1]
        if topic.name != without and not silent:
            bag.add(topic.name, topic.type, content, at_ns)

    for episode in range(episodes):
        begin = BEGIN + episode * 3_000 * MS + (recorder_clock_set_ns if episode else 0)
        if marked:
            bag.mark(begin, "begin", episode=episode, seed=100 + episode, instruction="touch the point")
        for tick in range(-20, int(DURATION_S * 100) + 20):
            now = begin + tick * 10 * MS
            seconds = tick * 0.01
            stamp = now + robot_clock_ns + (robot_clock_set_ns if episode else 0)
            arm = HOME + np.array([0.1 * seconds, 0, 0, 0, 0, 0, 0])
            add(topics.joint_states, now + MS, joint_state(stamp, arm))
            if 0 <= tick <= DURATION_S * 100:
                moved = position + np.array([0, SPEED_M_S * seconds, 0])
                # The sign of a quaternion means nothing, and drivers flip it.
                add(topics.target_pose, now, pose(now, moved, quaternion * (-1) ** tick))
            if tick == 50:
                bag.add(topics.gripper_command.name, topics.gripper_command.type, {"data": 0.0}, now)
            if tick % 5 == 0:
                for camera in ROBOT.cameras.values():
                    add(camera.image, now + 2 * MS, image(stamp, 100 + tick // 5))
                bag.text(topics.twin_truth.name, now, TRUTH)
        if marked:
            end = {"success": episode % 2 == 0, "failure": "" if episode % 2 == 0 else "timeout"}
            bag.mark(begin + int(DURATION_S * 1e9), "end", episode=episode, **end, milestones={"reached": True})
    return bag.close()


def described(path: Path) -> Description:
    description = read_description(path)
    assert description is not None
    return description


def test_import_rebuilds_the_run_on_the_grid_of_the_control_rate(tmp_path):
    path = write_run(tmp_path / "run.mcap", episodes=2)
    result = import_recording(path, tmp_path / "data", described(path))
    assert (result.episodes, result.successes, result.steps, result.skipped) == (2, 1, 40, ())
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.embodiment == EMBODIMENT
    first, second = dataset.episodes
    assert (first.seed, first.success, first.failure, first.source, first.operator) == (
        100,
        True,
        "",
        "twin",
        "diffusion",
    )
    assert (second.seed, second.success, second.failure) == (101, False, "timeout")
    assert first.instruction == "touch the point"
    assert first.milestones == {"reached": True}
    arrays = dataset.read(first)
    # 0.2 m/s at 20 Hz is 1 cm per step: half of the action limit, along y, and nothing else.
    np.testing.assert_allclose(arrays["actions"][:, 1], 0.5, atol=1e-3)
    np.testing.assert_allclose(arrays["actions"][:, [0, 2, 3, 4, 5]], 0.0, atol=1e-3)
    # The gripper closes at 0.5 s, so the action from 0.45 s to 0.5 s is the first that closes it.
    assert arrays["actions"][:, 6].tolist() == [1.0] * 9 + [-1.0] * 11
    position, _ = Kinematics(EMBODIMENT).forward(HOME)
    np.testing.assert_allclose(arrays["step/target"][-1, :3], position + np.array([0, 0.2, 0]), atol=1e-6)
    # Images count up once per tick, and that of the tick itself is still on its way; so are joint states of 1 ms.
    assert arrays["obs/front_image"][:, 0, 0, 0].tolist() == list(range(99, 119))
    np.testing.assert_allclose(arrays["obs/proprio"][:, -7], HOME[0] + 0.005 * np.arange(20) - 1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["obs/object_state"][3], TRUTH["object_state"])
    assert arrays["rewards"].tolist() == [0.0] * 19 + [1.0]
    assert arrays["dones"].tolist() == [0] * 19 + [1]
    assert (np.diff(arrays["step/timestamp_ns"]) == 50 * MS).all()


@pytest.mark.parametrize("ahead_ms", [-600, -450, -300, -60, 300, 3_600_000])
def test_clock_of_another_computer_does_not_matter(tmp_path, ahead_ms):
    """One that was behind by less than half a second was a delay: joint states of later were observed already."""
    here = write_run(tmp_path / "here.mcap")
    there = write_run(tmp_path / "there.mcap", robot_clock_ns=ahead_ms * MS)
    assert import_recording(here, tmp_path / "a", described(here)).notes == ()
    notes = import_recording(there, tmp_path / "b", described(there)).notes
    assert [note.split(":")[0] for note in notes] == ["/joint_states", "/front/image_raw", "/wrist/image_raw"]
    assert f"are {abs(1 - ahead_ms) / 1000:.3f} s {'before' if ahead_ms < 0 else 'after'} their arrival" in notes[0]
    a, b = Dataset.open(tmp_path / "a"), Dataset.open(tmp_path / "b")
    left, right = a.read(a.episodes[0]), b.read(b.episodes[0])
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("set_s", [-86_400, -3_600, -2.5, 2.5, 3_600])
@pytest.mark.parametrize("clock", ["robot", "recorder"])
def test_a_clock_that_is_set_between_episodes_does_not_matter(tmp_path, clock, set_s):
    """A live robot goes on as well; before, everything after a clock was set back was lost."""
    path = write_run(tmp_path / "run.mcap", episodes=3, **{f"{clock}_clock_set_ns": int(set_s * 1e9)})
    result = import_recording(path, tmp_path / "data", described(path))
    assert (result.episodes, result.skipped) == (3, ())
    dataset = Dataset.open(tmp_path / "data")
    first, *others = [dataset.read(episode) for episode in dataset.episodes]
    for arrays in others:
        np.testing.assert_array_equal(arrays["obs/front_image"], first["obs/front_image"])
        np.testing.assert_allclose(arrays["obs/proprio"], first["obs/proprio"], atol=1e-3)
        np.testing.assert_allclose(arrays["actions"], first["actions"], atol=5e-3)


def test_a_clock_that_is_set_by_years_in_an_episode_costs_this_episode_only(tmp_path):
    path = write_run(tmp_path / "run.mcap", episodes=1)
    description = described(path)
    bag = Bag(tmp_path / "jumped.mcap")
    bag.mark(BEGIN, "begin", episode=0, seed=0, instruction="touch the point")
    bag.add(ROBOT.topics.joint_states.name, ROBOT.topics.joint_states.type, joint_state(BEGIN, HOME), BEGIN)
    years = BEGIN + 10 * 365 * 86_400 * 1_000 * MS
    bag.mark(years, "end", episode=0, success=True, failure="", milestones={})
    with pytest.raises(DatasetError, match="silent for most of its 315360000 s"):
        import_recording(bag.close(), tmp_path / "data", description)


def test_old_messages_that_are_sent_again_do_not_look_like_a_clock_that_was_set():
    track = Track("/joint_states")
    for tick in range(20):
        track.add(tick * 10 * MS, tick * 10 * MS + MS, tick)
    for tick in range(20):
        track.add(tick % 3 * 10 * MS, (20 + tick) * 10 * MS, -1)
    assert track.values == list(range(20))


def test_time_that_a_person_takes_to_judge_is_not_imported(tmp_path):
    path = tmp_path / "run.mcap"
    write_run(path)
    # The same run, but the motion is over after 0.5 s, and the judgement comes at its end.
    bag = Bag(tmp_path / "judged.mcap")
    kinds = {**recorded_topics(ROBOT), MARKS_TOPIC: "std_msgs/msg/String"}
    over = BEGIN + 500 * MS
    for message in BagReader(path).messages(list(kinds)):
        if over is not None and message.arrived_ns > over:
            bag.mark(over, "over")
            over = None
        bag.add(message.topic, kinds[message.topic], message.content, message.arrived_ns)
    result = import_recording(bag.close(), tmp_path / "data", described(path))
    assert (result.episodes, result.successes, result.steps) == (1, 1, 10)


@pytest.mark.parametrize(
    ("topic", "blackout_s", "held"),
    [
        ("/front/image_raw", (0.2, 0.72), range(10, 16)),
        ("/front/image_raw", (0.6, 9.0), range(18, 20)),
        ("/joint_states", (0.3, 0.8), range(8, 17)),
        ("/joint_states", (0.5, 9.0), range(12, 20)),
    ],
)
def test_the_observation_is_repeated_while_an_input_is_silent(tmp_path, topic, blackout_s, held):
    """As the robot did that held then, and went on or ended the episode; such episodes were left out."""
    path = write_run(tmp_path / "run.mcap", blackout=topic, blackout_s=blackout_s)
    result = import_recording(path, tmp_path / "data", described(path))
    assert (result.episodes, result.skipped) == (1, ())
    assert f"episode 0: {len(held)} of 20 steps repeat an observation" in result.notes[0]
    assert topic in result.notes[0]
    dataset = Dataset.open(tmp_path / "data")
    arrays = dataset.read(dataset.episodes[0])
    observed = [arrays[name].reshape(20, -1) for name in ("obs/proprio", "obs/front_image", "obs/wrist_image")]
    # Of proprioception the target (9:12) is what is commanded, and known all the time.
    observed[0] = np.delete(observed[0], range(9, 12), axis=1)
    for rows in observed:
        assert (rows[held] == rows[held[0] - 1]).all()
        assert all((rows[step] != rows[step - 1]).any() for step in {1, 2, 3, *range(held[-1] + 1, 20)})
    np.testing.assert_allclose(arrays["actions"][:, 1], 0.5, atol=1e-3)


def test_an_input_that_was_silent_for_longer_than_a_robot_holds_skips_the_episode_and_says_so(tmp_path):
    path = write_run(tmp_path / "run.mcap", blackout="/front/image_raw", blackout_s=(0.2, 0.85))
    description = described(path)
    impatient = dataclasses.replace(ROBOT, staleness=dataclasses.replace(ROBOT.staleness, stop_s=0.2))
    description = dataclasses.replace(description, robot=impatient)
    with pytest.raises(DatasetError, match=r"episode 0: /front/image_raw is silent for 0\.75 s \(at most 0\.6 s\)"):
        import_recording(path, tmp_path / "data", description)
    # Nothing is left that would be in the way of the next attempt.
    assert [one.name for one in tmp_path.iterdir()] == ["run.mcap"]


@pytest.mark.parametrize("topic", ["/joint_states", "/wrist/image_raw"])
def test_missing_topic_is_named(tmp_path, topic):
    path = write_run(tmp_path / "run.mcap", without=topic)
    with pytest.raises(DatasetError, match=topic):
        import_recording(path, tmp_path / "data", described(path))


def test_bag_of_another_program_becomes_one_episode(tmp_path, capsys):
    path = write_run(tmp_path / "bag.mcap", described=False, marked=False)
    assert read_description(path) is None
    output = tmp_path / "data"
    arguments = ["data", "import", str(path), "--output", str(output)]
    with pytest.raises(ConfigError, match="give --task NAME"):
        cli.run(arguments)
    cli.run([*arguments, "--task", "reach", "--image-size-px", "32", "--success"])
    assert "1 episodes (1 successes)" in capsys.readouterr().out
    dataset = Dataset.open(output)
    assert dataset.episodes[0].success
    assert dataset.episodes[0].source == "robot"
    actions = dataset.read(dataset.episodes[0])["actions"]
    np.testing.assert_allclose(actions[1:-1, 1], 0.5, atol=1e-2)
    assert json.loads((output / "results.json").read_text())["import"]["episodes"] == 1


def test_a_bag_that_was_written_later_keeps_the_times_of_its_stamps(tmp_path):
    kinds = {name: kind for name, kind in recorded_topics(ROBOT).items() if not kind.startswith("std_msgs/")}
    plain, bag = write_run(tmp_path / "plain.mcap", marked=False), Bag(tmp_path / "converted.mcap")
    for number, message in enumerate(BagReader(plain).messages(list(kinds))):
        bag.add(message.topic, kinds[message.topic], message.content, BEGIN + 1_000_000 * MS + number * 1000)
    rows = []
    for path in (plain, bag.close()):
        import_recording(path, tmp_path / path.stem, described(plain))
        dataset = Dataset.open(tmp_path / path.stem)
        rows.append(dataset.read(dataset.episodes[0]))
    assert abs(len(rows[0]["actions"]) - len(rows[1]["actions"])) <= 4  # topics end within 200 ms of each other
    for arrays in rows:
        np.testing.assert_allclose(np.diff(arrays["obs/proprio"][:, -7]), 0.005, atol=1e-5)
        assert set(np.diff(arrays["obs/front_image"][:, 0, 0, 0].astype(int))) == {1}


def test_compressed_images_are_imported(tmp_path):
    bag = Bag(tmp_path / "bag.mcap")
    _, png = cv2.imencode(".png", np.full((64, 48, 3), (10, 20, 30), np.uint8))
    bag.add("/image", "sensor_msgs/msg/CompressedImage", stamped(BEGIN, format="png", data=png.tobytes()), BEGIN)
    message = next(iter(BagReader(bag.close()).messages(["/image"])))
    from simtoreal.robot.camera_ros import decode_message

    assert decode_message(message.content, "/image")[5, 5].tolist() == [30, 20, 10]


def test_existing_dataset_and_files_that_are_no_recordings_are_refused(tmp_path):
    path = write_run(tmp_path / "run.mcap")
    import_recording(path, tmp_path / "data", described(path))
    with pytest.raises(DatasetError, match="is a dataset already"):
        import_recording(path, tmp_path / "data", described(path))
    noise = tmp_path / "noise.mcap"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(DatasetError, match="not an MCAP file"):
        read_description(noise)
    empty = tmp_path / "empty.mcap"
    empty.touch()
    with pytest.raises(DatasetError, match="not an MCAP file"):
        read_description(empty)
    with pytest.raises(DatasetError, match="cannot read"):
        read_description(tmp_path / "none.mcap")


def test_recording_cut_anywhere_gives_what_was_before(tmp_path):
    path = write_run(tmp_path / "run.mcap", episodes=2)
    whole = path.read_bytes()
    cut = tmp_path / "cut.mcap"
    counts = []
    for size in np.linspace(2000, len(whole) - 1, 12).astype(int):
        cut.write_bytes(whole[:size])
        reader = BagReader(cut)
        counts.append(len(list(reader.messages([ROBOT.topics.joint_states.name]))))
        assert size == len(whole) - 1 or (not reader.complete and reader.damaged)
    assert counts == sorted(counts)
    assert counts[-1] == 280
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    result = import_recording(cut, tmp_path / "data", described(cut))
    assert result.episodes == 2
    episodes = Dataset.open(tmp_path / "data").episodes
    assert [episode.failure for episode in episodes] == ["", "aborted"]


def test_flipped_bits_lose_a_chunk_not_the_run(tmp_path):
    path = write_run(tmp_path / "run.mcap")
    damaged = bytearray(path.read_bytes())
    # Records are an opcode (6: chunk of messages), a length in 8 bytes and a content, after the file's 8 magic bytes.
    chunks, at = [], 8
    while at < len(damaged) - 8:
        length = int.from_bytes(damaged[at + 1 : at + 9], "little")
        if damaged[at] == 6:
            chunks.append(at + 9 + length // 2)
        at += 9 + length
    middle = chunks[len(chunks) // 2]
    for at in range(middle, middle + 64):
        damaged[at] ^= 0xFF
    path.write_bytes(damaged)
    reader = BagReader(path)
    count = len(list(reader.messages([ROBOT.topics.joint_states.name])))
    assert 0 < count < 140
    assert reader.damaged


def test_messages_without_sense_are_counted_and_left_out(tmp_path):
    path = tmp_path / "run.mcap"
    write_run(path)
    messages = list(BagReader(path).messages([*recorded_topics(ROBOT), MARKS_TOPIC]))
    bag = Bag(tmp_path / "odd.mcap")
    kinds = {**recorded_topics(ROBOT), MARKS_TOPIC: "std_msgs/msg/String"}
    for message in messages:
        bag.add(message.topic, kinds[message.topic], message.content, message.arrived_ns)
        if message.topic == "/joint_states" and message.arrived_ns % (100 * MS) == MS:
            broken = joint_state(message.arrived_ns + 1, np.full(7, np.nan))
            bag.add("/joint_states", kinds["/joint_states"], broken, message.arrived_ns + 1)
    bag.mark(BEGIN + 100 * MS, "begin", episode="one")
    result = import_recording(bag.close(), tmp_path / "data", described(path))
    assert (result.episodes, result.steps) == (1, 20)
    assert any("is not finite" in line for line in result.damaged)
    assert any("mark 'begin' has episode 'one'" in line for line in result.damaged)


def test_track_of_a_silent_sender_says_which():
    track = Track("/joint_states")
    with pytest.raises(DatasetError, match="nothing was recorded on /joint_states"):
        track.interpolate(np.array([0, 1]), 1.0, 1.0)
    with pytest.raises(DatasetError, match="/joint_states is silent at the beginning"):
        track.newest(np.array([0, 1]), 1.0)


@pytest.mark.parametrize(
    "kind",
    [
        "sensor_msgs/msg/JointState",
        "sensor_msgs/msg/Image",
        "sensor_msgs/msg/CameraInfo",
        "trajectory_msgs/msg/JointTrajectory",
        "geometry_msgs/msg/PoseStamped",
    ],
)
def test_message_definitions_agree_with_an_independent_source(kind):
    import importlib

    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    package, _, name = kind.split("/")
    text = message_definition(getattr(importlib.import_module(f"{package}.msg"), name))
    store = get_typestore(Stores.ROS2_JAZZY)
    parsed = get_types_from_msg(text, kind)
    for each, (_, fields) in parsed.items():
        assert fields == store.fielddefs[each][1], each


class Publishers:
    """Joint states at 100 Hz, two cameras and the gate's status at 20 Hz over real DDS, until closed."""

    def __init__(self) -> None:
        from rclpy.node import Node
        from sensor_msgs.msg import Image, JointState

        self.context = start_ros()
        self.node = Node("recording_rig", context=self.context)
        self.joints = self.node.create_publisher(JointState, "/joint_states", 10)
        gate = ROBOT.topics.gate_status
        self.gate = self.node.create_publisher(gate.message_class(), gate.name, gate.qos())
        self.gate_message = gate.message_class()()
        self.cameras = [self.node.create_publisher(Image, f"/{name}/image_raw", 10) for name in ROBOT.cameras]
        self.joint_message, self.image_class = JointState(), Image
        self.joint_message.name = [*ROBOT.joint_names, *ROBOT.finger_joint_names]
        self.joint_message.position = [*HOME.tolist(), 0.04, 0.04]
        self.published, self.sent_ns = 0, []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        generator = np.random.default_rng(0)
        while not self.stop.wait(0.01):
            stamp = self.node.get_clock().now().to_msg()
            self.joint_message.header.stamp = stamp
            self.joints.publish(self.joint_message)
            self.sent_ns.append(time.time_ns())
            if self.published % 5 == 0:
                self.gate.publish(self.gate_message)
                for publisher in self.cameras:
                    picture = self.image_class(height=32, width=32, step=96, encoding="rgb8")
                    picture.header.stamp = stamp
                    picture.data = generator.bytes(3072)
                    publisher.publish(picture)
            self.published += 1

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
        self.node.destroy_node()
        self.context.shutdown()


@pytest.fixture
def publishers():
    rig = Publishers()
    yield rig
    rig.close()


def recorder_of(path: Path) -> RunRecorder:
    return RunRecorder(path, ROBOT, embodiment=EMBODIMENT, task=TASK, source="twin", operator="test")


def wait_for(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def joint_times(path: Path) -> list[int]:
    return [message.published_ns for message in BagReader(path).messages(["/joint_states"])]


def result_of(success: bool) -> EpisodeResult:
    return EpisodeResult(
        episode=0, seed=7, success=success, steps=10, duration_s=0.5, milestones={}, instruction="go", failure=""
    )


@pytest.mark.realtime
def test_recorded_run_becomes_an_episode(tmp_path, publishers):
    path = tmp_path / "run.mcap"
    with recorder_of(path) as recorder:
        wait_for(lambda: path.stat().st_size > 100_000)
        recorder.on_reset(0, 0, 7, {}, {"instruction": "go"})
        time.sleep(0.5)
        recorder.on_episode(0, result_of(True))
        time.sleep(0.1)
        assert recorder.problem == ""
    assert recorder.close() == recorder.messages, "may be called again"
    reader = BagReader(path)
    topics = [message.topic for message in reader.messages([*recorded_topics(ROBOT), MARKS_TOPIC])]
    assert reader.complete
    assert not reader.damaged
    assert len(topics) == recorder.messages
    assert topics.count(MARKS_TOPIC) == 2
    result = import_recording(path, tmp_path / "data", described(path))
    episode = Dataset.open(tmp_path / "data").episodes[0]
    assert (result.episodes, episode.seed, episode.success) == (1, 7, True)
    assert 9 <= episode.steps <= 12
    # Nothing was commanded, so the target stayed where the arm was.
    assert np.abs(Dataset.open(tmp_path / "data").read(episode)["actions"][:, :6]).max() < 1e-3


@pytest.mark.realtime
def test_other_tools_read_the_recording(tmp_path, publishers):
    from rosbags.typesys import Stores, get_typestore

    path = tmp_path / "run.mcap"
    with recorder_of(path):
        wait_for(lambda: path.stat().st_size > 100_000)
    from mcap.reader import make_reader

    store = get_typestore(Stores.ROS2_JAZZY)
    with open(path, "rb") as stream:
        reader = make_reader(stream, decoder_factories=[])
        assert reader.get_header().profile == "ros2"
        assert reader.get_summary().statistics.message_count > 20
        _, channel, message = next(reader.iter_messages(topics=["/joint_states"]))
    decoded = store.deserialize_cdr(message.data, "sensor_msgs/msg/JointState")
    assert channel.message_encoding == "cdr"
    np.testing.assert_allclose(decoded.position, [*HOME, 0.04, 0.04])


@pytest.mark.realtime
def test_killed_recorder_loses_little_and_is_noticed(tmp_path, publishers):
    path = tmp_path / "run.mcap"
    recorder = recorder_of(path)
    wait_for(lambda: path.stat().st_size > 300_000)
    killed_ns = time.time_ns()
    os.kill(recorder._process.pid, signal.SIGKILL)
    recorder._process.join()
    with pytest.raises(RobotError, match="not recorded any more: the recorder ended with exit status -9"):
        recorder.on_step(None)
    times = joint_times(path)
    stalled_ns = np.diff(publishers.sent_ns).max()  # a busy machine sends nothing for a while
    # A chunk of 64 kB is 0.4 s of this traffic; polling adds 0.05 s.
    assert killed_ns - times[-1] < 1_500 * MS + stalled_ns
    # Nothing is missing before.
    assert np.diff(times).max() < 490 * MS + stalled_ns
    with pytest.raises(RobotError, match="is incomplete: the recorder ended with exit status -9"):
        recorder.close()


@pytest.mark.realtime
def test_a_recorder_that_is_told_to_end_finishes_its_file_and_says_so(tmp_path, publishers):
    path = tmp_path / "run.mcap"
    recorder = recorder_of(path)
    os.kill(recorder._process.pid, signal.SIGHUP)  # of a terminal that is gone
    wait_for(lambda: path.stat().st_size > 100_000)
    assert not recorder.problem
    os.kill(recorder._process.pid, signal.SIGTERM)  # as timeout(1) does with the whole group
    recorder._process.join(20.0)
    reader = BagReader(path)
    assert list(reader.messages(["/joint_states"]))
    assert reader.complete
    with pytest.raises(RobotError, match=r"not recorded any more: it was told to end \(SIGTERM\)"):
        recorder.on_step(None)
    with pytest.raises(RobotError, match="is incomplete"):
        recorder.close()


@pytest.mark.realtime
def test_full_disk_ends_the_recording_not_the_run(tmp_path, publishers):
    path = tmp_path / "run.mcap"
    recorder = recorder_of(path)
    resource.prlimit(recorder._process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    recorder._process.join(20.0)
    # Nobody has asked for a problem yet: the end of the run has to tell.
    with pytest.raises(RobotError, match=r"is incomplete: .*File too large.* What was recorded before is intact"):
        recorder.close()
    recorder.mark("begin", episode=1)
    assert len(joint_times(path)) > 5


@pytest.mark.realtime
def test_recorder_finishes_its_file_when_the_runtime_dies(tmp_path, publishers):
    import multiprocessing

    path = tmp_path / "run.mcap"
    context = multiprocessing.get_context("spawn")
    runtime = context.Process(target=_record_for_ever, args=(path,))
    runtime.start()
    wait_for(lambda: path.exists() and path.stat().st_size > 100_000, timeout_s=30.0)
    runtime.kill()
    runtime.join()

    def finished() -> bool:
        reader = BagReader(path)
        list(reader.messages([]))
        return reader.complete

    wait_for(finished)


def _record_for_ever(path: Path) -> None:
    recorder = recorder_of(path)
    assert not recorder.problem
    time.sleep(60)


@pytest.mark.realtime
def test_run_on_the_twin_becomes_its_dataset(tmp_path):
    from simtoreal.data_collection.expert import ScriptedExpert
    from simtoreal.envs import Listener, rollout
    from simtoreal.robot.deployment import running_twin
    from simtoreal.robot.gate import SafetyGate
    from simtoreal.robot.gate_limits import GateLimits
    from simtoreal.robot.ros2_env import Ros2Env

    targets, images = [], []

    class Watching(Listener):
        """Keeps what the runtime itself commanded and saw."""

        def on_step(self, step):
            targets.append(step.info["target"][0])
            images.append(step.observation["front_image"][0])

    task, path = load_task("reach"), tmp_path / "run.mcap"
    # Nothing here is about staleness, and the machine may be busy.
    staleness = dataclasses.replace(ROBOT.staleness, joint_states_s=0.5, camera_s=1.0, stop_s=2.0)
    robot = dataclasses.replace(ROBOT, staleness=staleness)
    with contextlib.ExitStack() as stack:
        stack.enter_context(running_twin("reach", EMBODIMENT, "panda_ros2", gap="none", seed=0, log=tmp_path / "twin"))
        gate = SafetyGate.start(robot, GateLimits.for_embodiment(EMBODIMENT), EMBODIMENT)
        stack.callback(gate.close)
        env = Ros2Env(task, embodiment=EMBODIMENT, config=robot, gate=gate, observe_truth=True)
        stack.callback(env.close)
        recorder = stack.enter_context(recorder_of(path))
        result = rollout(env, ScriptedExpert(task, EMBODIMENT), [3], listeners=[recorder, Watching()])[0]
    import_recording(path, tmp_path / "data", described(path))
    dataset = Dataset.open(tmp_path / "data")
    episode = dataset.episodes[0]
    assert (episode.seed, episode.success, episode.instruction) == (3, result.success, result.instruction)
    # Time goes on in a recording while a busy machine misses periods.
    missed = env.clock.missed
    assert -1 <= episode.steps - result.steps <= 1 + missed
    arrays = dataset.read(episode)
    wished, stored = np.stack(targets)[:, :3], arrays["step/target"][:, :3]
    # Ticks of the recording are its own, so that a busy machine may put a target into the tick beside its own one.
    shifts = range(-1 - missed, 2)
    near = [np.abs(stored - wished[np.clip(np.arange(len(stored)) + k, 0, len(wished) - 1)]) for k in shifts]
    difference = np.min([one.max(axis=-1) for one in near], axis=0)
    # The gate limits acceleration, so the pose that reached the robot trails the wish by millimetres at first.
    assert difference.mean() < 2e-3
    assert difference.max() < 1e-2
    # Every image that the runtime saw is in the dataset, within a tick of where it was seen.
    kept = {image.tobytes() for image in arrays["obs/front_image"]}
    assert np.mean([image.tobytes() in kept for image in images]) > 0.8


def test_recordings_are_never_overwritten(tmp_path):
    path = tmp_path / "run.mcap"
    path.touch()
    with pytest.raises(DatasetError, match="recordings are never overwritten"):
        recorder_of(path)

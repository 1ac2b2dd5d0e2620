"""The twin: its physics and gap, and the node on a real ROS 2 graph."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from simtoreal.envs import load_task, make_env, panda_embodiment
from simtoreal.envs.errors import ConfigError, RobotError
from simtoreal.robot.deployment import check_twin, twin_results
from simtoreal.robot.gap import GAPS, load_gap, sample_latency
from simtoreal.robot.topics import load_robot_config, start_ros
from simtoreal.robot.twin import Twin
from simtoreal.robot.twin_world import TICK_S, TwinWorld

pytest.importorskip("rclpy")

pytestmark = pytest.mark.realtime

EMBODIMENT = panda_embodiment(32)
TASK = load_task("pick_place")
SECOND = round(1.0 / TICK_S)


@pytest.fixture
def world():
    world = TwinWorld(TASK, EMBODIMENT, "none")
    world.begin(5)
    yield world
    world.close()


def ticks(world: TwinWorld, count: int) -> None:
    for _ in range(count):
        world.tick()


def test_a_seed_means_the_same_scene_as_in_simulation(world) -> None:
    env = make_env("pick_place", observe="state")
    observation, _ = env.reset(seed=5)
    np.testing.assert_allclose(world.truth()["object_state"], observation["object_state"], atol=1e-6)
    np.testing.assert_allclose(world.measure_joints()[0], observation["proprio"][-7:], atol=1e-6)


def test_the_arm_follows_commands_once_they_agree_with_it(world) -> None:
    start, down = world._position[0].copy(), world._quaternion[0].copy()
    world.command_pose(start + np.array([0.2, 0, 0]), down)
    world.command_gripper(0.0)
    ticks(world, SECOND // 4)
    assert not world.engaged
    assert np.abs(world.fields["site_xpos"][0, world._tcp] - start).max() < 5e-3, "a command far away is ignored"
    for step in range(1, 11):
        world.command_pose(start + np.array([0.01 * step, 0, 0]), down)
        ticks(world, 5)
    world.command_gripper(0.0)
    ticks(world, SECOND // 2)
    assert np.abs(world.fields["site_xpos"][0, world._tcp] - start - [0.1, 0, 0]).max() < 5e-3
    assert world.measure_joints()[2].max() < 0.002
    world.begin(6)
    assert not world.engaged


def test_success_is_judged_by_the_tasks_own_goal(world) -> None:
    ticks(world, SECOND // 2)
    truth = world.truth()
    assert not truth["success"]
    assert set(truth["milestones"]) == set(TASK.milestones)
    plate = world.fields["mocap_pos"][0, world.objects["plate"].mocap]
    cube = world.objects["cube"]
    world.fields["qpos"][0, cube.qpos : cube.qpos + 3] = plate + np.array([0, 0, 0.03])
    ticks(world, SECOND)
    assert world.truth()["success"]


def test_divergence_is_told_and_the_next_episode_is_sound(world) -> None:
    world.fields["qvel"][0, :7] = 1e12
    ticks(world, 5)
    assert world.fault
    assert world.truth()["fault"]
    assert not world.truth()["success"]
    world.begin(7)
    ticks(world, 5)
    assert not world.fault


def test_the_standard_gap_is_drawn_from_the_seed() -> None:
    drawn = []
    worlds = [TwinWorld(TASK, EMBODIMENT, "standard") for _ in range(2)]
    nominal = worlds[0].model
    cube = worlds[0].objects["cube"]
    for seed in range(12):
        for world in worlds:
            world.begin(seed)
        first, second = worlds
        assert first.latency == second.latency
        for name in ("body_mass", "geom_friction", "actuator_gainprm", "cam_pos", "cam_quat", "light_pos"):
            np.testing.assert_array_equal(first._varied.physics[name], second._varied.physics[name])
        for camera, image in first.draw().items():
            assert image.shape == (32, 32, 3)
            assert camera in ("front", "wrist")
        mass = first._varied.physics["body_mass"][0, cube.body] / nominal.body_mass[cube.body]
        friction = first._varied.physics["geom_friction"][0, cube.geoms[0], 0] / nominal.geom_friction[cube.geoms[0], 0]
        gain = first._varied.physics["actuator_gainprm"][0, 0, 0] / nominal.actuator_gainprm[0, 0]
        moved = np.linalg.norm(first._varied.physics["cam_pos"][0] - nominal.cam_pos, axis=-1)
        total = first.latency.command_s + first.latency.observation_s
        assert 0.7 <= mass <= 1.3
        assert friction == pytest.approx(0.7)
        assert gain == pytest.approx(0.85)
        assert ((moved >= 0.01) & (moved <= 0.02)).all()
        assert min(abs(total - 0.05), abs(total - 0.10)) < 1e-9
        drawn.append((mass, total, first.latency.command_s))
    assert all(len(set(values)) > 1 for values in zip(*drawn, strict=True))
    for world in worlds:
        world.close()


def test_gap_names() -> None:
    assert [load_gap(name) for name in GAPS]
    with pytest.raises(ConfigError, match="Did you mean 'standard'"):
        load_gap("standart")
    with pytest.raises(ConfigError, match="unknown gap 'training'"):
        load_gap("training")
    assert sample_latency(0, 0.05, 3) == sample_latency(0, 0.05, 4)


def test_joint_states_are_never_stale_by_latency(config) -> None:
    most = load_gap("hard").latency_steps[1]
    drawn = [sample_latency(most, 0.05, seed) for seed in range(200)]
    assert max(one.observation_s for one in drawn) > config.staleness.joint_states_s
    assert max(one.joint_states_s for one in drawn) < 0.5 * config.staleness.joint_states_s


class Listener:
    """A node that keeps everything it hears from the twin and can talk to it."""

    def __init__(self, config) -> None:
        self.config = config
        self.heard: dict[str, list] = {}
        self.context = start_ros()
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node

        self.node = Node("listener", context=self.context, use_global_arguments=False)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        topics = {"joints": config.topics.joint_states, "truth": config.topics.twin_truth}
        for name, camera in config.cameras.items():
            topics |= {f"{name}_image": camera.image, f"{name}_info": camera.camera_info}
        for key, topic in topics.items():
            self.heard[key] = []
            self.node.create_subscription(topic.message_class(), topic.name, self.heard[key].append, topic.qos())
        command = config.topics.twin_command
        self.requests = self.node.create_publisher(command.message_class(), command.name, command.qos())

    def spin_until(self, condition, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the twin did not do it in time"
            self.executor.spin_once(timeout_sec=0.05)

    def truth(self) -> dict:
        return json.loads(self.heard["truth"][-1].data) if self.heard["truth"] else {}

    def ask(self, content) -> None:
        message = self.config.topics.twin_command.message_class()()
        message.data = content if isinstance(content, str) else json.dumps(content)
        self.requests.publish(message)

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        self.context.shutdown()


@pytest.fixture
def config():
    return load_robot_config()


@pytest.fixture
def listener(config):
    listener = Listener(config)
    yield listener
    listener.close()


@pytest.fixture
def twin(config):
    stop = threading.Event()
    ready: list[Twin] = []

    def live() -> None:
        twin = Twin(TASK, EMBODIMENT, config, gap="none", seed=3)
        ready.append(twin)
        twin.run(stop)
        twin.close()

    thread = threading.Thread(target=live)
    thread.start()
    while not ready and thread.is_alive():
        time.sleep(0.01)
    yield ready[0]
    stop.set()
    thread.join(20)
    assert not thread.is_alive()


def test_topics_requests_and_service(twin, listener, config) -> None:
    heard = listener.heard
    listener.spin_until(lambda: all(heard.values()) and len(heard["joints"]) > 30)
    joints = heard["joints"][-1]
    assert list(joints.name) == [*config.joint_names, *config.finger_joint_names]
    assert np.abs(np.array(joints.position[:7]) - EMBODIMENT.home_joint_positions_rad).max() < 0.15
    assert list(joints.position[7:]) == pytest.approx([0.04, 0.04], abs=2e-3)
    stamps = [message.header.stamp.sec * 10**9 + message.header.stamp.nanosec for message in heard["joints"]]
    assert (np.diff(stamps) > 0).all()
    image, info = heard["wrist_image"][-1], heard["wrist_info"][-1]
    assert (image.height, image.width, image.encoding, len(image.data)) == (32, 32, "rgb8", 32 * 32 * 3)
    assert image.header.frame_id == "wrist_optical_frame"
    assert np.frombuffer(image.data, np.uint8).std() > 5
    assert info.k[4] == pytest.approx(EMBODIMENT.cameras[1].intrinsics[1])
    assert listener.truth()["seed"] == 3

    request = {"request": "a", "episode": 9, "seed": 11, "task": "pick_place"}
    listener.spin_until(lambda: listener.requests.get_subscription_count() == 1)
    for content in ("not json", "[1]", {"request": "x"}, request, request):
        listener.ask(content)
    listener.spin_until(lambda: listener.truth().get("request") == "a")
    truth = listener.truth()
    assert (truth["error"], truth["episode"], truth["seed"]) == ("", 9, 11)
    assert twin.episodes == 2, "a request that is repeated is served once"
    env = make_env("pick_place", observe="state")
    objects = env.reset(seed=11)[0]["object_state"]
    # The cube has settled by less than a millimetre since.
    np.testing.assert_allclose(truth["object_state"], objects, atol=1e-3)

    listener.ask(request | {"request": "b", "task": "lift"})
    listener.spin_until(lambda: listener.truth().get("request") == "b")
    assert "simtoreal twin --task lift" in listener.truth()["error"]
    assert twin.episodes == 2

    from std_srvs.srv import Trigger

    client = listener.node.create_client(Trigger, config.services.twin_reset)
    listener.spin_until(client.service_is_ready)
    answer = client.call_async(Trigger.Request())
    listener.spin_until(answer.done)
    assert answer.result().success
    listener.spin_until(lambda: listener.truth().get("seed") == 12)


def test_bad_commands_are_ignored(twin, listener, config) -> None:
    topic = config.topics.target_pose
    publisher = listener.node.create_publisher(topic.message_class(), topic.name, topic.qos())
    listener.spin_until(lambda: publisher.get_subscription_count() == 1 and bool(listener.heard["truth"]))
    start = twin.world._position[0].copy()
    for x, frame, w in (
        (np.nan, config.base_frame, 0.0),
        (start[0], "camera", 0.0),
        (start[0], config.base_frame, 3.0),
    ):
        message = topic.message_class()()
        message.header.frame_id = frame
        message.pose.position.x, message.pose.position.y, message.pose.position.z = x, start[1], start[2] + 0.02
        message.pose.orientation.x, message.pose.orientation.w = 1.0, w
        publisher.publish(message)
    count = len(listener.heard["truth"])
    listener.spin_until(lambda: len(listener.heard["truth"]) > count + 3)
    assert not twin.world.engaged
    np.testing.assert_array_equal(twin.world._position[0], start)


def test_contradictions_are_refused(config) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'hard'"):
        Twin(TASK, EMBODIMENT, config, gap="harder")
    cameras = {"frond": config.cameras["front"], "wrist": config.cameras["wrist"]}
    with pytest.raises(ConfigError, match=r"no camera 'front'.*Did you mean 'frond'"):
        Twin(TASK, EMBODIMENT, dataclasses.replace(config, cameras=cameras))


def test_the_command_ends_on_a_signal() -> None:
    code = "from simtoreal.commands.twin import Config, main; main(Config(gap='hard', image_size=32))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert "twin of panda runs 'pick_place' with gap 'hard'" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=20)[0]
    assert process.returncode == 0
    assert "episodes in" in rest


def test_skipped_time_is_published_per_episode(config, listener, monkeypatch) -> None:
    """A machine that stalls for a second while the twin draws."""
    twin, stop = Twin(TASK, EMBODIMENT, config, gap="none", seed=3), threading.Event()
    draw, stalls = twin.world.draw, [0.0] * 9 + [1.0]

    def slow_draw():
        time.sleep(stalls.pop(0) if stalls else 0.0)
        return draw()

    monkeypatch.setattr(twin.world, "draw", slow_draw)
    thread = threading.Thread(target=twin.run, args=(stop,))
    thread.start()
    try:
        listener.spin_until(lambda: listener.truth().get("skipped_s", 0.0) > 0.5)
        # A busy machine may have lost some time before the second that this one loses.
        assert json.loads(listener.heard["truth"][0].data)["skipped_s"] < 0.5
        assert listener.truth()["skipped_s"] <= twin.skipped_s
        listener.spin_until(lambda: listener.requests.get_subscription_count() == 1)
        listener.ask({"request": "next", "episode": 1, "seed": 4, "task": "pick_place"})
        listener.spin_until(lambda: listener.truth().get("request") == "next")
        assert listener.truth()["skipped_s"] < 0.5, "an episode does not inherit what the one before lost"
    finally:
        stop.set()
        thread.join(20)
        twin.close()


def test_camera_sizes_of_a_real_robot_do_not_concern_the_twin(config) -> None:
    large = {name: dataclasses.replace(camera, width=640, height=480) for name, camera in config.cameras.items()}
    twin = Twin(TASK, EMBODIMENT, dataclasses.replace(config, cameras=large), gap="none")
    twin.world.begin(0)
    assert twin.world.draw()["front"].shape == (32, 32, 3)
    twin.close()


def test_the_end_of_the_twins_log_is_shown(tmp_path) -> None:
    log = tmp_path / "twin.log"
    log.write_text("\n".join(f"line {number}" for number in range(30)) + "\nno OpenGL\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        check_twin(process, log)
        process.communicate(b"")
    with pytest.raises(RobotError, match=r"status 1; .*twin.log says:\n  line 23(\n.*)*no OpenGL"):
        check_twin(process, log)

    assert twin_results({1: 0.0, 2: 0.03}) == ({"twin_skipped_s": 0.03}, [])
    results, notes = twin_results({1: 0.0, 2: 0.5})
    assert results == {"twin_skipped_s": 0.5}
    assert "up to 0.50 s in 1 of 2 episodes" in notes[0]

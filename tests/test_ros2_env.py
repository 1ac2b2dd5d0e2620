"""Ros2Env on a real ROS 2 graph: what it does with a good robot, and with every kind of bad input."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from kinematic_robot import KinematicRobot

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.recorder import Recorder, stream_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import load_task, panda_embodiment, rotation
from simtoreal.envs.errors import ActionError, ConfigError, RobotError, SafetyError, StaleObservationError
from simtoreal.envs.rollout import Listener, rollout
from simtoreal.robot import inputs, ros2_env, twin_client
from simtoreal.robot.gate_limits import MotionLimits
from simtoreal.robot.homing import HOMING_SPEED_M_S, path_home
from simtoreal.robot.images import decode_image, fit_image
from simtoreal.robot.inputs import JointStates
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.ros2_env import Ros2Env
from simtoreal.robot.topics import load_robot_config

pytest.importorskip("rclpy")
from sensor_msgs.msg import CompressedImage, Image

pytestmark = pytest.mark.realtime

EMBODIMENT = panda_embodiment(32)
HOME = np.array(EMBODIMENT.home_joint_positions_rad)
FORWARD = np.array([0.5, 0, 0, 0, 0, 0, 1], dtype=np.float32)
STILL = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)


@pytest.fixture(scope="module")
def config():
    loaded = load_robot_config()
    # Patient enough for a machine that is busy with other tests, impatient enough to be fast.
    patience = dataclasses.replace(loaded.staleness, joint_states_s=0.4, camera_s=0.5, stop_s=0.4)
    return dataclasses.replace(loaded, staleness=patience)


@pytest.fixture
def robot(config):
    robot = KinematicRobot(config, EMBODIMENT)
    yield robot
    robot.close()


@pytest.fixture
def make(config, robot, monkeypatch):
    """Makes environments on the robot that nobody has to wait for."""
    monkeypatch.setattr(ros2_env, "READY_TIMEOUT_S", 3.0)
    monkeypatch.setattr(twin_client, "TWIN_TIMEOUT_S", 1.0)
    monkeypatch.setattr(inputs, "DISCOVERY_LEASE_S", 0.5)
    made = []

    def build(**options):
        options = {"config": config, "gate": robot, "operator": lambda text: None} | options
        made.append(Ros2Env(load_task("pick_place"), embodiment=EMBODIMENT, **options))
        return made[-1]

    yield build
    for env in made:
        env.close()


def test_homing_and_targets(make, robot) -> None:
    robot.joints = HOME + np.array([0.3, 0.2, 0, -0.1, 0, 0.1, 0.3])
    asked = []
    env = make(operator=lambda text: asked.append((text, robot.joints.copy(), len(robot.targets))))
    begin = robot.joints.copy()
    observation, info = env.reset(seed=7)
    (consent, joints, sent), (arrange, homed, _) = asked
    assert "move home" in consent
    assert sent == 0, "nothing moves before a person has agreed"
    np.testing.assert_array_equal(joints, begin)
    assert "Arrange 'pick_place' (initial condition 7)" in arrange
    home = Kinematics(EMBODIMENT).forward(HOME)[0]
    assert np.abs(env._kinematics.forward(homed)[0] - home).max() < 1e-3, "the scene is arranged with the arm at home"
    path = np.array([target[:3] for target, _ in robot.targets])
    speed = np.linalg.norm(np.diff(path, axis=0), axis=1).max() / EMBODIMENT.control_period_s
    assert speed <= HOMING_SPEED_M_S * 1.01
    assert info["instruction"] in env.task.instructions
    assert observation["front_image"].shape == (32, 32, 3)
    np.testing.assert_allclose(observation["proprio"][:3], info["target"][:3], atol=1e-6)

    robot.targets.clear()
    moved = 0
    while moved < 3:
        before, held = info["target"], bool(info["robot_fault"])  # a machine that stalls silences the robot
        observation, _, terminated, truncated, info = env.step(FORWARD)
        np.testing.assert_allclose(info["target"] - before, [0.0 if held else 0.01, *[0] * 9], atol=1e-12)
        moved += not held
        assert not terminated
        assert not truncated
    assert len(robot.targets) == 3
    assert {episode for _, episode in robot.targets} == {robot.episodes[-1]}
    np.testing.assert_array_equal(robot.targets[-1][0], info["target"])
    np.testing.assert_allclose(observation["proprio"][:3], info["target"][:3], atol=2e-4)


def test_an_arm_in_the_scene_rises_before_it_goes_home() -> None:
    kinematics = Kinematics(EMBODIMENT)
    low, down = np.array([0.6, 0.2, 0.05]), np.array([0.0, 1.0, 0.0, 0.0])
    joints = kinematics.solve_ik(low, down)
    begin, home = kinematics.forward(joints)[0], kinematics.forward(HOME)[0]
    path = np.array(path_home(joints, kinematics, EMBODIMENT, MotionLimits()))
    moved_aside = np.linalg.norm(path[:, :2] - begin[:2], axis=1) > 1e-9
    assert (path[moved_aside, 2] >= home[2] - 1e-9).all()
    assert (np.diff(path[~moved_aside, 2]) > 0).all()
    assert (~moved_aside).sum() > 10
    np.testing.assert_allclose(path[-1, :3], home)
    assert (path[:, 9] == 1.0).all()
    stays = path_home(HOME, kinematics, EMBODIMENT, MotionLimits())
    np.testing.assert_allclose(stays[0][:3], home, atol=1e-9)


def test_an_elbow_that_is_elsewhere_is_said(config) -> None:
    kinematics = Kinematics(EMBODIMENT)
    env: Any = SimpleNamespace(embodiment=EMBODIMENT, config=config, _kinematics=kinematics)
    swung = kinematics.solve_ik(*kinematics.forward(HOME), HOME + [0.5, 0, -0.5, 0, 0.3, 0, 0])
    for joints, message in ((swung, "elbow is not"), (HOME + [0.3, 0, 0, 0, 0, 0, 0], "path blocked")):
        with pytest.raises(RobotError, match=message):
            Ros2Env._check_at_home(env, inputs.Arm(joints, 1.0, 0, 0))
    Ros2Env._check_at_home(env, inputs.Arm(HOME, 1.0, 0, 0))


def test_an_operator_who_does_not_agree_stops_the_arm(make, robot) -> None:
    def refuse(text: str) -> None:
        raise ConfigError("nobody is at the terminal")

    with pytest.raises(ConfigError, match="nobody"):
        make(operator=refuse).reset(seed=0)
    assert robot.targets == []


def test_homing_waits_while_the_gate_holds(make, robot) -> None:
    robot.joints = HOME + np.array([0.3, 0.2, 0, -0.1, 0, 0.1, 0.3])
    send_target, limit = robot.send_target, HOMING_SPEED_M_S * EMBODIMENT.control_period_s

    def send(*given: Any) -> None:
        send_target(*given)
        robot.held = "joint_states is 110 ms old" if 3 <= len(robot.targets) < 10 else ""

    robot.send_target = send
    make().reset(seed=0)
    steps = np.linalg.norm(np.diff([target[:3] for target, _ in robot.targets], axis=0), axis=1)
    assert (steps[2:9] == 0).all(), "an arm that is held would rush after targets that go on"
    assert steps[9] > 0
    assert steps.max() < 1.01 * limit


@pytest.mark.parametrize("way", ["stop", "closed", "silent"])
def test_homing_ends_when_its_operator_ends_it_or_could_not(robot, config, monkeypatch, way: str) -> None:
    from simtoreal.data_collection import teleop_page
    from simtoreal.data_collection.teleop_hub import InputHub
    from simtoreal.data_collection.teleop_loop import SessionEnd, SessionOptions, TeleopSession
    from simtoreal.data_collection.teleop_session import Board
    from simtoreal.robot.teleop_env import TeleopRos2Env

    # Only the test says when the page is silent, not the load of this machine.
    monkeypatch.setattr(teleop_page, "PRESENT_NS", 600_000_000_000)
    board = Board()
    page = teleop_page.PageDevice(board)
    hub = InputHub([page], EMBODIMENT)
    session = TeleopSession(SessionOptions(task="pick_place", first_seed=0), None, hub, page, None, board)
    env = TeleopRos2Env(
        load_task("pick_place"), embodiment=EMBODIMENT, config=config, gate=robot, operator=lambda text: None,
        check_operator=session.check_operator, hub=hub,
    )  # fmt: skip
    page.connect()
    still = {"engaged": False, "motion": [0.0] * 6, "drag": None, "gripper": None, "at": None, "sent": None}
    page.feed({"type": "input", "n": 1, "stage": 0, **still})
    ways = {
        "stop": lambda: page.feed({"type": "event", "n": 2, "name": "stop", "stage": 0}),
        "closed": page.disconnect,
        "silent": lambda: setattr(page, "_heard_ns", -(10**18)),
    }
    robot.joints = HOME + np.array([0.8, 0.5, 0, -0.1, 0, 0, 0])
    send_target, rests = robot.send_target, []
    robot.end_episode = lambda: rests.append(len(robot.targets))

    def send(*given: Any) -> None:
        send_target(*given)
        if len(robot.targets) == 5:
            ways[way]()

    robot.send_target = send
    try:
        with pytest.raises(SessionEnd if way == "stop" else RobotError, match="stopped on its way home"):
            env.reset(seed=0)
    finally:
        env.close()
        hub.close()
    assert len(robot.targets) == 5, "no target follows"
    assert rests == [5], "and the gate is told that none will"


def test_what_is_wrong_with_the_robot_is_said_at_once(make, robot, monkeypatch) -> None:
    monkeypatch.setattr(ros2_env, "READY_TIMEOUT_S", 60.0)
    robot.silent.add("joint_states")

    def died() -> None:
        raise RobotError("the twin has ended: no OpenGL")

    with pytest.raises(RobotError, match="no OpenGL"):
        make(operator=None, check_robot=died).reset(seed=0)


def test_camera_sizes_of_the_yaml_are_those_of_the_real_robot(make, robot, config) -> None:
    large = {name: dataclasses.replace(camera, width=640, height=480) for name, camera in config.cameras.items()}
    sized = dataclasses.replace(config, cameras=large)
    with pytest.raises(RobotError, match="32x32 images; expected 640x480"):
        make(config=sized).reset(seed=0)
    with pytest.raises(StaleObservationError, match="no twin answers"):  # its images were good
        make(config=sized, operator=None).reset(seed=0)


def test_permuted_names_change_nothing(make, robot) -> None:
    env = make()
    plain, _ = env.reset(seed=0)
    robot.permutation = np.random.default_rng(0).permutation(9)
    permuted, _ = env.reset(seed=0)
    np.testing.assert_allclose(permuted["proprio"], plain["proprio"], atol=1e-3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"drop": {"panda_joint3"}}, r"lacks \['panda_joint3'\]"),
        ({"scale": 57.29578}, "degrees"),
        ({"size": (48, 48)}, "48x48 images; expected 32x32"),
        ({"fov_scale": 2.0}, "focal length"),
        ({"silent": {"wrist"}}, "'wrist' has delivered no image"),
        ({"silent": {"joint_states"}}, "nothing received on /joint_states"),
        ({"torn": {"front"}}, "torn"),
    ],
)
def test_bad_inputs_are_named_at_reset(make, robot, monkeypatch, fault, message) -> None:
    monkeypatch.setattr(ros2_env, "READY_TIMEOUT_S", 1.0)
    for name, value in fault.items():
        setattr(robot, name, value)
    with pytest.raises(RobotError, match=message):
        make().reset(seed=0)
    assert robot.targets == []


def test_an_input_that_stalls_before_the_first_observation_is_waited_for(make, robot, config) -> None:
    env = make()
    align, stalls = env._align_clock, iter(["joint_states", "front"])

    def align_and_stall() -> None:
        align()
        if stalled := next(stalls, None):
            robot.silent.add(stalled)
            time.sleep(config.staleness.camera_s + 0.1)
            robot.silent.clear()

    env._align_clock = align_and_stall
    _, info = env.reset(seed=0)
    assert info["robot_fault"] == ""
    assert next(stalls, None) is None
    # And what is silent for good is said.
    env._align_clock = lambda: (align(), robot.silent.add("joint_states"), time.sleep(config.staleness.camera_s + 0.1))
    with pytest.raises(
        StaleObservationError, match=r"not ready after 3 s.*joint_states.*ROS_DOMAIN_ID \d+ \(discovery LOCALHOST\)"
    ):
        env.reset(seed=0)


def test_a_camera_that_stalls_while_the_clock_is_aligned_to_it_is_waited_for() -> None:
    kinematics, waited = Kinematics(EMBODIMENT), []
    inputs_there: Any = SimpleNamespace(
        wait_until_ready=lambda *_, **__: waited.append(True) or inputs.Arm(HOME, 1.0, 0, 0),
        restart_counts=lambda: None,
    )
    stalls = iter(["no image within 0.3 s", "no image within 0.3 s", ""])

    def align() -> None:
        if stalled := next(stalls):
            raise StaleObservationError(stalled)

    env: Any = SimpleNamespace(
        _inputs=inputs_there, _kinematics=kinematics, _check_at_home=lambda arm: None, _align_clock=align,
        _observe=lambda: None,
    )  # fmt: skip
    Ros2Env._begin(env)
    assert env._fault == ""
    assert len(waited) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"silent": {"front"}}, "camera 'front' is"),
        ({"silent": {"joint_states"}}, "no message on /joint_states"),
        ({"torn": {"wrist"}}, "torn"),
        ({"scale": 57.29578}, "degrees"),
    ],
)
def test_a_lost_input_holds_and_then_ends_the_episode(make, robot, fault, message) -> None:
    env = make()
    _, info = env.reset(seed=0)
    env.step(FORWARD)
    for name, value in fault.items():
        setattr(robot, name, value)
    sent_while_held, truncated = 0, False
    for _ in range(60):
        held, sent = bool(info.get("robot_fault")), len(robot.targets)
        observation, _, _, truncated, info = env.step(FORWARD)
        sent_while_held += held and len(robot.targets) > sent
        if truncated:
            break
    assert truncated
    assert sent_while_held == 0
    assert message in info["sim_fault"].replace("newest image of ", "")
    assert message in info["robot_fault"].replace("newest image of ", "")
    assert np.isfinite(observation["proprio"]).all()


def test_a_short_loss_is_survived(make, robot) -> None:
    env = make()
    env.reset(seed=0)
    robot.silent.add("joint_states")
    while not (info := env.step(STILL)[4])["robot_fault"]:
        pass
    held = info["target"]
    robot.silent.clear()
    for _ in range(20):
        _, _, _, truncated, info = env.step(FORWARD)
        if not info["robot_fault"] and info["target"][0] > held[0]:
            break
    assert not truncated
    assert info["target"][0] == pytest.approx(held[0] + 0.01)


def test_the_target_waits_while_only_the_gate_holds(make, robot) -> None:
    """It went on before, and the arm rushed after it when the gate did."""
    env = make()
    env.reset(seed=0)
    env.step(FORWARD)
    robot.held = "the gate holds: joint_states is 120 ms old"
    info = step_until(env, lambda info: info["robot_fault"] == robot.held)
    held, sent, seen = info["target"], len(robot.targets), info["capture_ns"]
    info = step_until(env, lambda info: info["capture_ns"] != seen)  # what is seen is not held
    assert len(robot.targets) > sent, "the gate would miss its targets too"
    for target, _ in robot.targets[sent:]:
        np.testing.assert_array_equal(target, held)
    np.testing.assert_array_equal(info["target"], held)
    robot.held = ""
    step_until(env, lambda info: not info["robot_fault"])
    assert env.step(FORWARD)[4]["target"][0] == pytest.approx(held[0] + 0.01)


def test_what_an_operator_does_while_the_gate_holds_is_not_recorded_as_executed(make, robot, config) -> None:
    from simtoreal.data_collection.teleop_hub import InputHub
    from simtoreal.robot.teleop_env import TeleopRos2Env

    hub = InputHub([], EMBODIMENT)
    env = TeleopRos2Env(
        load_task("pick_place"), embodiment=EMBODIMENT, config=config, gate=robot, operator=lambda text: None, hub=hub
    )
    try:
        env.reset(seed=0)
        env.reactive, robot.held = False, "the gate holds: joint_states is 120 ms old"
        before = step_until(env, lambda info: info["robot_fault"] == robot.held)["target"]
        info = env.step(FORWARD)[4]
    finally:
        env.close()
        hub.close()
    np.testing.assert_array_equal(info["executed_action"], STILL)
    np.testing.assert_array_equal(info["target"], before)


def step_until(env, condition) -> dict:
    """Step forward until the condition on the info is true: a busy machine may silence the robot itself meanwhile."""
    for _ in range(60):
        info = env.step(FORWARD)[4]
        if condition(info):
            return info
    raise AssertionError("the condition did not come true")


SENSORS = ("joint_states", "gripper", "front", "wrist")


def test_every_sensor_has_its_own_stamps(make, robot) -> None:
    env = make()
    _, info = env.reset(seed=0)
    robot.skipped["wrist"] = 4
    observed = 0
    for _ in range(40):
        assert tuple(info["capture_ns"]) == tuple(info["receive_ns"]) == SENSORS
        for sensor in SENSORS:
            assert info["capture_ns"][sensor] <= info["receive_ns"][sensor] <= info["timestamp_ns"]
        assert info["timestamp_ns"] > observed
        observed = info["timestamp_ns"]
        info = env.step(STILL)[4]
    received, dropped = info["received_frames"], info["dropped_frames"]
    # About 30 of 40 images arrive and 10 are missing; a busy machine delays some, but does not invent them.
    assert 5 <= dropped["wrist"] <= received["wrist"]
    assert dropped["front"] < dropped["wrist"]
    assert received["joint_states"] > 2 * received["front"]
    env.reset(seed=1)
    assert env.step(STILL)[4]["received_frames"]["front"] < 20, "counted per episode"


def test_a_held_observation_keeps_its_stamps(make, robot) -> None:
    env = make()
    env.reset(seed=0)
    robot.resent = True
    arrived = robot.joint_publisher.topic_name
    before = env.step(STILL)[4]
    while not (info := env.step(STILL)[4])["robot_fault"]:
        before = info
    assert f"no message on {arrived}" in info["robot_fault"], "old measurements do not become new by sending them again"
    held = env.step(STILL)[4]
    assert held["capture_ns"] == info["capture_ns"] == before["capture_ns"]
    assert held["receive_ns"] == before["receive_ns"]
    assert held["timestamp_ns"] > info["timestamp_ns"] > before["timestamp_ns"]


def test_stamps_are_recorded_with_the_observation_they_belong_to(make, robot, tmp_path) -> None:
    env, seen = make(), []

    class Witness(Listener):
        def on_reset(self, slot, episode, seed, observation, info) -> None:
            seen.append(info)

        def on_step(self, step) -> None:
            seen.append({key: step.info[key] for key in ("timestamp_ns", "capture_ns", "receive_ns")})

    class Still:
        observation_steps, execute_steps, ensembling = 1, 1, None

        def reset(self, slots, seeds) -> None:
            pass

        def act(self, observation, instructions, slots) -> np.ndarray:
            return STILL[None, None]

    env.task = dataclasses.replace(env.task, horizon=12)
    with DatasetWriter(tmp_path, EMBODIMENT, {"pick_place": {}}) as writer:
        recorder = Recorder(
            stream_takes(writer), task="pick_place", embodiment=EMBODIMENT, source="teleop", operator="o",
            keep=lambda result: True,
        )  # fmt: skip
        rollout(env, Still(), [0], listeners=[recorder, Witness()])
    dataset = Dataset.open(tmp_path)
    (episode,) = dataset.episodes
    arrays = dataset.read(episode)
    assert episode.columns["capture_ns"] == episode.columns["receive_ns"] == SENSORS
    for name in ("capture_ns", "receive_ns"):
        expected = [[int(np.squeeze(info[name][sensor])) for sensor in SENSORS] for info in seen[:-1]]
        np.testing.assert_array_equal(arrays[f"step/{name}"], expected)
    np.testing.assert_array_equal(
        arrays["step/timestamp_ns"], [int(np.squeeze(info["timestamp_ns"])) for info in seen[:-1]]
    )
    sensors = episode.extra["sensors"]
    assert tuple(sensors) == SENSORS
    ages = (arrays["step/timestamp_ns"][:, None] - arrays["step/capture_ns"]) * 1e-6
    assert sensors["front"]["age_ms"]["max"] >= ages[:, 2].max() - 1e-6
    assert all(sensor["received"] > 0 for sensor in sensors.values())


def test_a_frozen_camera_is_noticed_while_the_arm_moves(make, robot) -> None:
    env = make()
    env.reset(seed=0)
    robot.frozen |= {"front", "wrist"}
    for _ in range(25):
        assert not env.step(STILL)[4]["robot_fault"], "a still scene may look the same"
    sway = FORWARD.copy()
    for step in range(60):
        sway[:2] = (0.8, 0.8) if step // 6 % 2 else (-0.8, -0.8)
        _, _, _, truncated, info = env.step(sway)
        if truncated:
            break
    assert truncated
    assert "frozen" in info["sim_fault"]


def test_a_frozen_camera_is_noticed_while_the_arm_moves_slowly(make, robot) -> None:
    env = make()
    env.reset(seed=0)
    robot.frozen |= {"front", "wrist"}
    slowly = np.array([0, 0.2, 0, 0, 0, 0, 1], dtype=np.float32)  # 0.08 m/s
    for _ in range(80):
        _, _, _, truncated, info = env.step(slowly)
        if truncated:
            break
    assert truncated
    assert "frozen" in info["sim_fault"]


def test_an_arm_that_rests_out_of_the_picture_is_no_frozen_camera(make, robot) -> None:
    env = make()
    env.reset(seed=0)
    robot.frozen |= {"front", "wrist"}
    for _ in range(8):  # 16 cm, more than what has to change a picture, and less time than ten pictures take
        assert not env.step(FORWARD)[4]["robot_fault"]
    for _ in range(40):
        assert not env.step(STILL)[4]["robot_fault"]


def test_an_arm_that_came_to_rest_unseen_is_no_frozen_camera(make, robot, config) -> None:
    # Pictures change again as soon as a person has agreed to the motion.
    env = make(operator=lambda text: robot.frozen.clear())
    env.reset(seed=0)
    env.step(FORWARD)
    # The arm goes on after the last look; then the pictures of a scene at rest are all the same.
    robot.joints = robot.joints + 0.02
    robot.frozen |= {"front", "wrist"}
    time.sleep(2 * config.staleness.frozen_frames / EMBODIMENT.control_hz)
    env.reset(seed=1)
    assert not env.step(STILL)[4]["robot_fault"]


def test_slower_limits_slow_the_target_and_what_is_recorded_of_an_operator(make, robot, config) -> None:
    from simtoreal.data_collection.teleop_hub import InputHub
    from simtoreal.robot.teleop_env import TeleopRos2Env

    slow = dataclasses.replace(config, limits=MotionLimits(max_speed_m_s=0.1))
    hub = InputHub([], EMBODIMENT)
    env = TeleopRos2Env(
        load_task("pick_place"), embodiment=EMBODIMENT, config=slow, gate=robot, operator=lambda text: None, hub=hub
    )
    try:
        before = env.reset(seed=0)[1]["target"]
        env.reactive = False
        info = env.step(FORWARD)[4]  # 1 cm: 0.2 m/s
    finally:
        env.close()
        hub.close()
    np.testing.assert_allclose(info["target"] - before, [0.005, *[0] * 9], atol=1e-9)
    np.testing.assert_array_equal(robot.targets[-1][0], info["target"])
    np.testing.assert_allclose(info["executed_action"], [0.25, 0, 0, 0, 0, 0, 1], atol=1e-6)


def test_the_gate_ends_the_episode(make, robot) -> None:
    env = make()
    env.reset(seed=0)

    def refuse(*_) -> None:
        raise SafetyError("the safety gate is estopped: emergency stop pressed")

    robot.send_target = refuse
    _, _, terminated, truncated, info = env.step(FORWARD)
    assert (terminated, truncated) == (False, True)
    assert "estopped" in info["sim_fault"]


@pytest.mark.parametrize("action", [np.full(7, np.nan), np.zeros(6), np.full(7, 1.5), np.array(["0"] * 7)])
def test_bad_actions_are_never_sent(make, robot, action) -> None:
    env = make()
    env.reset(seed=0)
    robot.targets.clear()
    with pytest.raises(ActionError):
        env.step(action)
    assert robot.targets == []


def test_two_robots_are_one_too_many(make, robot, config) -> None:
    second = KinematicRobot(config, EMBODIMENT)
    try:
        with pytest.raises(RobotError, match="2 nodes publish /joint_states"):
            make().reset(seed=0)
    finally:
        second.close()


def test_no_twin_answers(make, robot) -> None:
    with pytest.raises(StaleObservationError, match="simtoreal twin --task pick_place"):
        make(operator=None).reset(seed=0)


def test_step_before_reset_and_unknown_options(make) -> None:
    env = make()
    with pytest.raises(RobotError, match="reset"):
        env.step(STILL)
    with pytest.raises(ConfigError, match="unknown reset options"):
        env.reset(seed=0, options={"init": 3})
    with pytest.raises(ConfigError, match="non-empty text"):
        env.set_instruction(" ")


def test_contradictions_are_refused(config, robot) -> None:
    task = load_task("pick_place")
    options = {"embodiment": EMBODIMENT, "config": config, "gate": robot}
    with pytest.raises(ConfigError, match="scene truth"):
        Ros2Env(task, **options, observe_truth=True, operator=lambda text: None)
    with pytest.raises(ConfigError, match="Did you mean 'image'"):
        Ros2Env(task, **options, observe="images")
    other = dataclasses.replace(config, robot="ur5e")
    with pytest.raises(ConfigError, match="describes 'ur5e'"):
        Ros2Env(task, **options | {"config": other})
    other = dataclasses.replace(config, cameras={"frond": config.cameras["front"], "wrist": config.cameras["wrist"]})
    with pytest.raises(ConfigError, match=r"no camera 'front'.*Did you mean 'frond'"):
        Ros2Env(task, **options | {"config": other})
    other = dataclasses.replace(config, joint_names=config.joint_names[:6])
    with pytest.raises(ConfigError, match=r"mine\.yaml: key 'joint_names' has 6 joints, 'panda' has 7"):
        other.require_fits(EMBODIMENT, "mine.yaml")
    with pytest.raises(ValueError, match=r"topics\.target_pose and topics\.estop are both '/target_pose'"):
        dataclasses.replace(
            config,
            topics=dataclasses.replace(
                config.topics, estop=dataclasses.replace(config.topics.estop, name="/target_pose")
            ),
        )


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "png"])
def test_images_of_every_encoding(encoding: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    if encoding == "png":
        message = CompressedImage(format="png", data=cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
    else:
        pixels = image if encoding.startswith("rgb") else image[:, :, ::-1]
        alpha = np.full((6, 8, 1), 255, dtype=np.uint8)
        pixels = np.concatenate([pixels, alpha], axis=-1) if "a" in encoding else pixels
        rows = np.pad(pixels.reshape(6, -1), ((0, 0), (0, 5)))
        message = Image(height=6, width=8, step=rows.shape[1], encoding=encoding, data=rows.tobytes())
    np.testing.assert_array_equal(decode_image(message, "/camera"), image)


def test_images_that_cannot_be_read() -> None:
    whole = Image(height=4, width=4, step=12, encoding="rgb8", data=bytes(48))
    assert decode_image(whole, "/camera").shape == (4, 4, 3)
    for changes, message in (
        ({"data": bytes(30)}, "torn"),
        ({"step": 11}, "torn"),
        ({"encoding": "16UC1"}, "encoding '16UC1'"),
    ):
        fields = {"height": 4, "width": 4, "step": 12, "encoding": "rgb8", "data": bytes(48)} | changes
        with pytest.raises(RobotError, match=message):
            decode_image(Image(**fields), "/camera")
    with pytest.raises(RobotError, match="torn"):
        decode_image(CompressedImage(format="jpeg", data=b"nothing"), "/camera")
    # A size that OpenCV refuses by an exception, which would end the thread of every input.
    jpeg = bytearray(cv2.imencode(".jpg", np.zeros((4, 4, 3), np.uint8))[1].tobytes())
    size = jpeg.find(b"\xff\xc0") + 5
    jpeg[size : size + 4] = (65_500).to_bytes(2, "big") * 2
    with pytest.raises(RobotError, match="torn"):
        decode_image(CompressedImage(format="jpeg", data=bytes(jpeg)), "/camera")


def test_larger_images_are_cropped_in_the_middle_and_averaged() -> None:
    image = np.zeros((480, 640, 3), dtype=np.uint8)
    image[:, 80:560] = 100
    image[:, 80:320] = 200
    small = fit_image(image, 64, 64)
    assert small.shape == (64, 64, 3)
    assert (small[:, :32] == 200).all()
    assert (small[:, 32:] == 100).all()


class _Message:
    def __init__(self, name, position) -> None:
        self.name, self.position = name, position


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.name.append("panda_joint1") or m.position.append(0.0), "more than once"),
        (lambda m: m.position.pop(), "9 names but 8 positions"),
        (lambda m: m.position.__setitem__(2, np.nan), "'panda_joint3' is not finite"),
        (lambda m: m.position.__setitem__(3, 1.0), "'panda_joint4' is at 1.000"),
        (lambda m: m.position.__setitem__(slice(7, 9), [40.0, 40.0]), "millimetres"),
    ],
)
def test_implausible_joint_states(config, change, message) -> None:
    kinematics = Kinematics(EMBODIMENT)
    reader = JointStates(config, kinematics.joint_low_rad, kinematics.joint_high_rad)
    good = _Message([*config.joint_names, *config.finger_joint_names], [*HOME, 0.02, 0.02])
    arm = reader.read(good, 5)
    assert arm.opening == pytest.approx(0.5)
    np.testing.assert_array_equal(arm.joint_positions_rad, HOME)
    change(good)
    with pytest.raises(RobotError, match=message):
        reader.read(good, 5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stop_s: 1.0", "stops_s: 1.0", "Did you mean 'stop_s'"),
        ("name: /estop", "name: estop", "absolute ROS name"),
        ("std_msgs/msg/Bool", "std_msgs/msg/String", "Valid: std_msgs/msg/Bool"),
        ("reliability: best_effort, depth: 1 }\n  target", "reliability: often, depth: 1 }\n  target", "best_effort"),
        ("command: target_pose", "command: target_poses", "Did you mean 'target_pose'"),
        ("finger_open: 0.04", "finger_open: wide", "finger_open"),
        ("finger_open: 0.04", "finger_open: .inf", "two different finite numbers"),
        ("robot: panda", "robot: [", "not valid yaml"),
    ],
)
def test_robot_yaml_errors_name_file_key_and_fix(tmp_path: Path, old, new, message) -> None:
    text = (Path(__file__).parent.parent / "configs/robot/panda_ros2.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        load_robot_config(path)
    assert "mine.yaml" in str(caught.value)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'panda_ros2'"):
        load_robot_config("panda_ros")


def test_inverse_kinematics_inverts_forward_kinematics() -> None:
    kinematics = Kinematics(EMBODIMENT)
    rng = np.random.default_rng(0)
    for _ in range(100):
        position = rng.uniform(EMBODIMENT.workspace_low_m, EMBODIMENT.workspace_high_m)
        turn = rotation.from_rotation_vector([*rng.uniform(-0.1, 0.1, 2), rng.uniform(-0.8, 0.8)])
        quaternion = rotation.quaternion_multiply(turn, np.array([0.0, 1.0, 0.0, 0.0]))
        joints = kinematics.solve_ik(position, quaternion)
        reached, turned = kinematics.forward(joints)
        assert np.linalg.norm(reached - position) < 1e-3
        away = rotation.quaternion_multiply(turned, rotation.quaternion_conjugate(quaternion))
        assert np.linalg.norm(rotation.to_rotation_vector(away)) < 2e-3
        assert (joints >= kinematics.joint_low_rad).all()
        assert (joints <= kinematics.joint_high_rad).all()
        if min((joints - kinematics.joint_low_rad).min(), (kinematics.joint_high_rad - joints).min()) < 0.15:
            continue  # folded up at a limit, where 1 cm may need much
        # A control step further on, the solution is near: the arm does not switch to another posture.
        near = kinematics.solve_ik(position + np.array([0, 0, 0.01]), quaternion, joints)
        assert np.abs(near - joints).max() < 0.2
    with pytest.raises(RobotError, match="no joint positions reach"):
        kinematics.solve_ik(np.array([1.5, 0, 0.2]), np.array([0.0, 1.0, 0.0, 0.0]))
    with pytest.raises(RobotError, match="finite"):
        kinematics.solve_ik(np.array([np.nan, 0, 0.2]), np.array([0.0, 1.0, 0.0, 0.0]))

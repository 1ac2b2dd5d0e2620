"""The robot backend end to end: twin, safety gate and Ros2Env in three processes keep the interface."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.envs import load_task, make_env, panda_embodiment, rollout
from simtoreal.envs.contract import check_robot_env

pytest.importorskip("rclpy")

pytestmark = pytest.mark.realtime


@contextlib.contextmanager
def robot_on_twin(folder: Path, **changes: str):
    """Ros2Env with the real safety gate on a live twin without a gap, each in its own process."""
    from simtoreal.robot.gate import SafetyGate
    from simtoreal.robot.gate_limits import GateLimits
    from simtoreal.robot.ros2_env import Ros2Env
    from simtoreal.robot.topics import load_robot_config

    text = (Path(__file__).parent.parent / "configs/robot/panda_ros2.yaml").read_text()
    # The machine may be busy with other tests.
    patience = {
        "joint_states_s: 0.1": "joint_states_s: 0.5",
        "camera_s: 0.3": "camera_s: 1.0",
        "stop_s: 1.0": "stop_s: 2.0",
    }
    for old, new in (patience | changes).items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "robot.yaml"
    path.write_text(text)
    code = f"from simtoreal.commands.twin import Config, main; main(Config(gap='none', topics={str(path)!r}))"
    twin = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    embodiment, config = panda_embodiment(), load_robot_config(path)
    gate = SafetyGate.start(config, GateLimits.for_embodiment(embodiment), embodiment)
    env = Ros2Env(load_task("pick_place"), embodiment=embodiment, config=config, gate=gate, observe_truth=True)
    try:
        yield env
    finally:
        env.close()
        gate.close()
        twin.terminate()
        twin.wait(20)


@pytest.fixture(scope="module")
def robot_env(tmp_path_factory):
    with robot_on_twin(tmp_path_factory.mktemp("robot")) as env:
        yield env


def test_the_robot_keeps_the_contract(robot_env) -> None:
    check_robot_env(robot_env, deterministic=False)


def test_the_same_expert_drives_simulation_and_robot(robot_env) -> None:
    task = load_task("pick_place")
    simulated = rollout(make_env(task, observe="state"), ScriptedExpert(task, panda_embodiment()), [100, 101])
    robot_env.twin_skipped_s.clear()
    driven = rollout(robot_env, ScriptedExpert(task, robot_env.embodiment), [100, 101])
    assert len(robot_env.twin_skipped_s) == len(driven)
    assert all(0 <= seconds < 5 for seconds in robot_env.twin_skipped_s.values())
    for result, reference in zip(driven, simulated, strict=True):
        assert reference.success
        assert result.success, result.failure
        assert result.milestones == reference.milestones
        assert result.instruction == reference.instruction


def test_position_controlled_arm_with_compressed_images(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "101")  # the twin of the tests above is still there
    changes = {
        "command: target_pose": "command: joint_trajectory",
        "sensor_msgs/msg/Image,": "sensor_msgs/msg/CompressedImage,",
        "image_raw,": "image_raw/compressed,",
        # Of the real cameras; the twin has the policy's.
        "width: null": "width: 640",
        "height: null": "height: 480",
    }
    with robot_on_twin(tmp_path, **changes) as env:
        (result,) = rollout(env, ScriptedExpert(env.task, env.embodiment), [100])
    assert result.success, result.failure

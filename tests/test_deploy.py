"""Deployment on a live twin: every process is the real one, only the policies are small and untrained."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra 'ros')")

from simtoreal.commands import deploy, doctor
from simtoreal.commands.deploy import Config, main
from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs import load_task, panda_embodiment
from simtoreal.envs.errors import ActionError, CheckpointError, ConfigError, RobotError, SafetyError
from simtoreal.evaluation.evaluate import check_settings
from simtoreal.evaluation.results import EvaluationError, load_evaluation, read_episodes
from simtoreal.robot.bag_import import import_recording, read_description
from simtoreal.robot.deployment import GroupedFaults, JudgedByOperator, join_graph, running_twin
from simtoreal.robot.gate_limits import MotionLimits
from simtoreal.robot.gate_messages import GateStatus
from simtoreal.robot.inference import InferenceProcess
from simtoreal.robot.topics import load_robot_config, start_ros


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("policy"))


def make_checkpoint(folder: Path, *, broken: bool = False, seeds: list[int] | None = None) -> Path:
    """An untrained ``bc`` policy for the default embodiment; ``broken`` overflows and answers NaN."""
    import torch

    from simtoreal.policies.bc import BCPolicy
    from simtoreal.policies.checkpoint import save_policy
    from simtoreal.policies.config import BCConfig, VisionConfig
    from simtoreal.policies.normalization import Statistics

    embodiment = panda_embodiment()
    ones = {key: np.ones(dim, dtype=np.float32) for key, dim in {"actions": 7, "proprio": 20}.items()}
    torch.manual_seed(0)
    config = BCConfig(vision=VisionConfig(widths=(8, 8), keypoints=4, features=16), hidden=32)
    policy = BCPolicy(config, embodiment, {key: Statistics(-value, value) for key, value in ones.items()})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1e30 if broken else 0.5)
    training = {"task": load_task("reach").to_dict(), **({"data": {"seeds": seeds}} if seeds else {})}
    save_policy(folder, policy, training=training)
    return folder


def wait_until_gone(processes: list[int]) -> None:
    """The last of them ends when it notices that its parent is gone, which may be just after it."""
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in processes):
        assert time.monotonic() < deadline, [pid for pid in processes if alive(pid)]
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end while it is looked at; its children pass to another one.
        with contextlib.suppress(FileNotFoundError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.realtime
def test_the_expert_solves_a_task_on_the_twin(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "run", actor="expert", task="reach", gap="none", episodes=2, videos=1)
    main(config)
    results = load_evaluation(config.output).results
    assert (results["backend"], results["gap"], results["n"]) == ("twin", "none", 2)
    assert results["success_rate"] == 1.0
    assert results["periods"] >= 10
    assert sum(results["period_error_histogram"]["counts"]) == results["periods"]
    assert results["gate"]["published"] > results["periods"]
    assert "jump" not in results["gate"]["fault_counts"]
    assert (config.output / "run-000.mcap").stat().st_size > 10_000
    assert len(list((config.output / "videos").glob("success_*.mp4"))) == 1
    before = (config.output / "results.json").read_bytes()
    main(config)  # all episodes are there: nothing runs, nothing changes
    assert (config.output / "results.json").read_bytes() == before


@pytest.mark.realtime
def test_a_policy_runs_beside_the_control_loop(tmp_path: Path, checkpoint: Path) -> None:
    config = Config(output=tmp_path / "run", policy=checkpoint, episodes=1, record=False, videos=0)
    main(config)
    results = json.loads((config.output / "results.json").read_text())
    assert results["task"] == "reach"
    assert results["steps"] == results["periods"] == load_task("reach").horizon
    assert results["inference_count"] >= results["steps"] // 8
    assert results["waiting_steps"] >= 1  # nothing can be known at the first step
    assert results["inference_p99_ms"] > 0
    late = {"command_silent", "camera_stale", "joint_states_stale", "stale_target"}  # as on any busy machine
    assert results["gate"]["fault_counts"].keys() <= late


def test_a_policy_that_returns_nan_ends_the_deployment(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, broken=True)
    config = Config(output=tmp_path / "run", policy=checkpoint, episodes=1, record=False, videos=0)
    with pytest.raises(ActionError, match="policy returned"):
        main(config)


def test_interrupting_stops_everything_within_seconds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simtoreal", "deploy", "--actor", "expert", "--task", "pick_place"]
    command += ["--output", str(tmp_path / "run"), "--episodes", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "episodes.jsonl").exists():  # the second episode is running
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        others = children(process.pid)
        assert len(others) >= 3  # twin, gate, recorder
        deadline = time.monotonic() + 10
        while process.poll() is None:  # impatient people press again and again, until the interpreter is gone
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        assert process.returncode == 130
        wait_until_gone(others)
        assert "interrupted" in process.stdout.read().decode()
    finally:
        process.kill()
        process.wait()


def test_killing_the_runtime_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simtoreal", "deploy", "--actor", "expert", "--task", "pick_place"]
    command += ["--output", str(tmp_path / "run"), "--episodes", "50"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "episodes.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        others = children(process.pid)
    finally:
        process.kill()
        process.wait()
    wait_until_gone(others)


def test_inference_gives_what_the_policy_gives(checkpoint: Path) -> None:
    from simtoreal.evaluation.policies import load_actor

    rng = np.random.default_rng(0)
    observation = {
        "front_image": rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8),
        "wrist_image": rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8),
        "proprio": rng.normal(size=(2, 20)).astype(np.float32),
    }
    _, actor = load_actor(checkpoint, device="cpu")
    actor.reset(np.array([0]), [7])
    expected = actor.act({key: value[None] for key, value in observation.items()}, ["go"], np.array([0]))[0]
    inference = InferenceProcess(checkpoint, device="cpu")
    try:
        assert inference.description.task["name"] == "reach"
        assert inference.poll() is None
        inference.request(observation, "go", tag="mark", new_seed=7)
        with pytest.raises(RobotError, match="still computing"):
            inference.request(observation, "go", tag="mark")
        prediction = inference.poll(20.0)
        assert prediction is not None
        assert prediction.tag == "mark"
        assert np.allclose(prediction.actions, expected, atol=1e-5)
        with pytest.raises(RobotError, match="reads 'front_image'"):
            inference.request({}, "go", tag=None)
        os.kill(inference.pid, signal.SIGSTOP)
        inference.request(observation, "go", tag=None)
        started = time.monotonic()
        assert inference.poll() is None
        assert time.monotonic() - started < 60  # waiting would end after START_TIMEOUT_S = 120
        os.kill(inference.pid, signal.SIGKILL)
        with pytest.raises(RobotError, match="has died"):
            inference.poll(20.0)
    finally:
        inference.close()


def test_large_datasets_and_malformed_messages(tmp_path: Path) -> None:
    import socket

    seeds = list(range(10**9, 10**9 + 10_000))  # 120 kB as text, twice what a message holds
    inference = InferenceProcess(make_checkpoint(tmp_path, seeds=seeds), device="cpu")
    try:
        assert inference.description.training_seeds == tuple(seeds)
        channel, (ours, theirs) = inference._channel, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with channel, theirs:
            inference._channel = ours
            for message in (b'{"shape": [8', b"[]", b"{}", b'{"shape": [1000000000, 7], "finished_ns": 1}', b"\xff"):
                inference.busy = True
                theirs.send(message)
                with pytest.raises(RobotError, match=r"malformed|not understood"):
                    inference.poll()
    finally:
        inference.close()


def test_a_robot_is_on_the_graph_of_the_environment_and_a_twin_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def graph(robot: str, **variables: str) -> tuple[str | None, str | None]:
        names = ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE")
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        join_graph(robot)
        domain, reach = (os.environ.get(name) for name in names)
        return domain, reach

    own = str(1 + os.getpid() % 100)
    local, wide = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}, {"ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"}
    assert graph("ros") == (None, None)
    assert graph("ros", ROS_DOMAIN_ID="7", **wide) == ("7", "SUBNET")
    assert graph("twin") == (own, "LOCALHOST")
    assert graph("twin", ROS_DOMAIN_ID="0") == (own, "LOCALHOST")
    assert graph("twin", ROS_DOMAIN_ID="0", **wide) == (own, "LOCALHOST")
    assert graph("twin", ROS_DOMAIN_ID="7", **local) == ("7", "LOCALHOST")
    assert graph("twin", ROS_DOMAIN_ID=own)[0] not in (own, None)


@pytest.mark.realtime
def test_a_robot_on_the_graph_needs_an_emergency_stop_and_a_judge(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rclpy.node import Node
    from rclpy.qos import DurabilityPolicy, QoSProfile

    def think(question: str) -> str:
        time.sleep(0.5)  # longer than images stay fresh
        return "y"

    monkeypatch.setattr("builtins.input", think)  # the person at the terminal
    config = Config(output=tmp_path / "run", policy=checkpoint, robot="ros", episodes=2, videos=0, device="cpu")
    log = tmp_path / "robot.log"
    with running_twin("reach", panda_embodiment(), "panda_ros2", gap="none", seed=0, log=log):
        with pytest.raises(SafetyError, match="nobody publishes the emergency stop"):
            main(config)
        context = start_ros()
        button, topic = Node("button", context=context, use_global_arguments=False), load_robot_config().topics.estop
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        button.create_publisher(topic.message_class(), topic.name, latched).publish(topic.message_class()(data=False))
        main(config)
        button.destroy_node()
        context.shutdown()
    results = load_evaluation(config.output).results
    assert (results["backend"], results["n"], results["successes"]) == ("robot", 2, 2)
    assert "command_silent_stop" not in results["gate"]["fault_counts"], "a person may take their time"
    episodes = read_episodes(config.output)
    recording = max(config.output.glob("run-*.mcap"))
    description = read_description(recording)
    assert description is not None
    import_recording(recording, tmp_path / "data", description)
    # What the person thought about is in no episode: that would be ten steps more. A busy machine's pauses are.
    for imported, run in zip(Dataset.open(tmp_path / "data").episodes, episodes, strict=True):
        assert -5 <= imported.steps - run.steps <= 5 + results["missed_periods"]


@pytest.mark.realtime
def test_a_latched_stop_fails_its_episode_but_not_the_evaluation(tmp_path: Path) -> None:
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    from rclpy.node import Node

    context, topics = start_ros(), load_robot_config().topics
    node = Node("intruder", context=context, use_global_arguments=False)
    publishers: list[Any] = []

    def on_status(message: Any) -> None:
        status = GateStatus.from_json(message.data)
        pose = topics.target_pose
        if status.state == "armed" and status.published > 20 and not publishers:
            publishers.append(node.create_publisher(pose.message_class(), pose.name, pose.qos()))
        elif status.latched and publishers[0] is not None:
            node.destroy_publisher(publishers[0])
            publishers[0] = None

    node.create_subscription(topics.gate_status.message_class(), topics.gate_status.name, on_status, 10)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):
            executor.spin()

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    config = Config(
        output=tmp_path / "run", actor="expert", task="pick_place", gap="none", episodes=2, record=False, videos=0
    )
    main(config)
    context.shutdown()
    thread.join(5)
    results = load_evaluation(config.output).results
    assert results["n"] == 2
    assert results["failures"].get("gate:foreign_publisher") == 1
    assert re.search("/target_pose by (intruder|a node that just appeared)", results["faults"][0])
    assert results["gate"]["fault_counts"]["foreign_publisher"] == 1
    assert set(results["realtime"]) == {"control", "gate"}
    assert all(isinstance(granted, bool) for granted in results["realtime"].values())


@pytest.mark.parametrize(
    ("fault", "robot_fault", "kind", "tag"),
    [
        ("front is frozen (held for 1.0 s)", "front is frozen", "command_silent_stop", "front is frozen"),
        ("wrist is 0.4 s old", "wrist is 0.4 s old", "camera_stale_stop", "gate:camera_stale_stop"),
        ("the safety gate is stopped", "", "command_silent_stop", "gate:command_silent_stop"),
        ("the twin diverged", "", "", "the twin diverged"),
    ],
)
def test_a_fault_is_counted_as_what_caused_it(fault: str, robot_fault: str, kind: str, tag: str) -> None:
    class Ended(gym.Env[Any, Any]):
        def step(self, action: Any) -> Any:
            return {}, 0.0, False, True, {"success": False, "sim_fault": fault, "robot_fault": robot_fault}

    gate: Any = SimpleNamespace(status=lambda: GateStatus(state="stopped", kind=kind))
    faults = GroupedFaults(Ended(), gate)
    assert faults.step(None)[4]["sim_fault"].startswith(tag)
    assert fault in faults.details[0]


def test_questions_are_asked_without_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from simtoreal.evaluation.progress import EpisodeProgress

    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    answers = iter(["perhaps", "Y"])

    def type_in(question: str) -> str:
        terminal.write("<")  # what is drawn behind this would be over what is typed
        print(question, end=">", flush=True)
        return next(answers)

    monkeypatch.setattr("builtins.input", type_in)
    with EpisodeProgress(Console(file=terminal, force_terminal=True), "policy [old]", 3) as progress:
        assert sys.stdout is not terminal, "the bar draws itself below what others print"
        assert deploy._ask_for_success(progress, None)
        assert sys.stdout is not terminal
    assert terminal.getvalue().count("<Did the robot succeed? [y/n] >") == 2
    assert "policy [old]" in terminal.getvalue()


ASKING = """
import contextlib, select, types
from simtoreal.commands import deploy
progress = types.SimpleNamespace(paused=contextlib.nullcontext)
select.select([0], [], [])  # the person has typed already
deploy._ask_person(progress, "The arm will move home.")
print("succeeded:", deploy._ask_for_success(progress, None))
"""


def test_what_was_typed_before_a_question_does_not_answer_it() -> None:
    terminal, child = pty.openpty()
    seen = ""

    def wait_for(pattern: str) -> None:
        nonlocal seen
        while not re.search(pattern, seen):
            seen += os.read(terminal, 1000).decode()

    os.write(terminal, b"\nn\nn\n")
    with subprocess.Popen([sys.executable, "-c", ASKING], stdin=child, stdout=child, stderr=child):
        wait_for("Press Enter: ")
        os.write(terminal, b"\n")
        wait_for("y/n. ")
        os.write(terminal, b"y\n")
        wait_for("succeeded: (True|False)")
    os.close(terminal)
    os.close(child)
    assert "succeeded: True" in seen


def test_nobody_is_asked_whether_a_fault_was_a_success() -> None:
    class Ended(gym.Env[Any, Any]):
        fault = ""

        def step(self, action: Any) -> Any:
            return {}, 0.0, False, True, {"success": False, "sim_fault": self.fault}

    def judge() -> bool:
        asked.append(True)
        return True

    asked: list[bool] = []
    env = Ended()
    assert JudgedByOperator(env, judge).step(None)[4]["success"]
    env.fault = "gate:estop"
    assert not JudgedByOperator(env, judge).step(None)[4]["success"]
    assert asked == [True]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ROS_DOMAIN_ID": "abc"}, "ROS_DOMAIN_ID is 'abc'; expected a whole number from 0 to 232"),
        ({"ROS_DOMAIN_ID": "233"}, "ROS_DOMAIN_ID is '233'"),
        ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCAL"}, "Did you mean 'LOCALHOST'"),
    ],
)
def test_a_graph_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for call in (start_ros, lambda: join_graph("ros")):
        with pytest.raises(ConfigError, match=message):
            call()
    assert message.split(";")[0].split("'")[-2] in doctor.check_ros().found
    assert "unset ROS_DOMAIN_ID" in doctor.check_ros().fix


def test_a_policy_runs_on_the_task_it_was_trained_on_even_if_another_has_its_name(tmp_path: Path) -> None:
    own = dataclasses.replace(load_task("reach"), horizon=7, description="our own reach")
    inference = SimpleNamespace(description=SimpleNamespace(task=own.to_dict()))
    task = deploy._trained_task(inference, Config(output=tmp_path, policy=tmp_path))
    assert task == own
    assert load_task(deploy._store_task(task, tmp_path / "new")) == own  # what the twin reads
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        deploy._store_task(task, blocked)


def test_another_robot_or_task_in_the_same_file_is_another_deployment(tmp_path: Path) -> None:
    config, task, robot = Config(output=tmp_path, actor="expert", task="reach"), load_task("reach"), load_robot_config()
    slower = dataclasses.replace(robot, limits=MotionLimits(max_speed_m_s=0.2))
    settings = [deploy._settings(config, task, each, None) for each in (robot, load_robot_config(), slower)]
    assert settings[0] == settings[1]
    assert {key for key in settings[0] if settings[0][key] != settings[2][key]} == {"robot_digest"}
    assert check_settings(tmp_path, settings[0]) == settings[0]
    with pytest.raises(EvaluationError, match=r"robot_digest: .* \(the robot's topics or limits were changed\)"):
        check_settings(tmp_path, settings[2])
    changed = deploy._settings(config, dataclasses.replace(task, goal="at(tcp, goal, 0.5)"), robot, None)
    with pytest.raises(EvaluationError, match=r"task_digest: .* \(the task's file was changed\)"):
        check_settings(tmp_path, changed)
    # Earlier versions noted none of them, or only the robot's.
    for missing in ({"task_digest"}, {"task_digest", "robot_digest"}):
        old = {key: value for key, value in settings[0].items() if key not in missing}
        folder = tmp_path / f"without {len(missing)}"
        folder.mkdir()
        assert check_settings(folder, old) == old
        assert check_settings(folder, settings[0]) == old


def test_a_missing_checkpoint_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        InferenceProcess(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "--policy is missing"),
        ({"actor": "expert"}, "needs --task"),
        ({"actor": "expert", "task": "reach", "robot": "ros"}, "--robot twin"),
        ({"policy": Path("x"), "episodes": 0}, "expected at least 1"),
        ({"policy": Path("x"), "robot": "ros", "gap": "hard"}, "--gap belongs to --robot twin"),
    ],
)
def test_contradictory_flags_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(output=tmp_path, **arguments)

"""Deployment on a live twin: every process is the real one, only the policies are small and untrained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra 'ros')")

from simtoreal.commands.deploy import Config, main
from simtoreal.envs import load_task, panda_embodiment
from simtoreal.envs.errors import ActionError, CheckpointError, ConfigError, RobotError
from simtoreal.evaluation.results import load_evaluation
from simtoreal.robot.inference import InferenceProcess


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("policy"))


def make_checkpoint(folder: Path, *, broken: bool = False) -> Path:
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
    save_policy(folder, policy, training={"task": load_task("reach").to_dict()})
    return folder


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


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


def test_a_policy_runs_beside_the_control_loop(tmp_path: Path, checkpoint: Path) -> None:
    config = Config(output=tmp_path / "run", policy=checkpoint, episodes=1, record=False, videos=0)
    main(config)
    results = json.loads((config.output / "results.json").read_text())
    assert results["task"] == "reach"
    assert results["steps"] == results["periods"] == load_task("reach").horizon
    assert results["inference_count"] >= results["steps"] // 8
    assert results["waiting_steps"] >= 1  # nothing can be known at the first step
    assert results["inference_p99_ms"] > 0
    assert results["gate"]["fault_counts"].keys() <= {"closed", "command_silent", "camera_stale", "joint_states_stale"}


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
        for _ in range(2):  # impatient people press twice
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        process.wait(timeout=10)
        assert process.returncode == 130
        assert not any(alive(pid) for pid in others)
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
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in others):
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
    ],
)
def test_contradictory_flags_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(output=tmp_path, **arguments)

"""How well a deployed 20 Hz control loop keeps its deadlines: ours against a plain policy loop.

    OMP_NUM_THREADS=1 python benchmarks/control_loop.py

Both arms run whole episodes on the same twin (standard gap), behind the same safety gate and on the same clock with
absolute deadlines, with the same diffusion policy (untrained, of the default size: only its cost matters), in turns.
Ours is what ``simtoreal deploy`` does: inference in its own process, real-time priority where the system allows it.
The peer computes a chunk inside the loop when the previous one is used up, with ordinary priority. Afterwards the
runtime is killed in full motion, repeatedly, and the time until the arm rests is read from the published stamps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from interleaved import read_no_flags, write_benchmark

if TYPE_CHECKING:
    from simtoreal.robot.topics import RobotConfig

TASK, ROUNDS, KILLS, FIRST_SEED = "pick_place", 8, 10, 300_000
KILLED = "run-until-killed"
PATIENCE_S = 30.0


def untrained_policy(folder: Path) -> Path:
    """A diffusion policy of the default size that hardly moves the arm."""
    from simtoreal.envs import load_task, panda_embodiment
    from simtoreal.policies.checkpoint import save_policy
    from simtoreal.policies.config import DiffusionConfig
    from simtoreal.policies.diffusion import DiffusionPolicy
    from simtoreal.policies.normalization import Statistics

    small, wide = np.full(7, 0.05, dtype=np.float32), np.ones(20, dtype=np.float32)
    bounds = {"actions": Statistics(-small, small), "proprio": Statistics(-wide, wide)}
    policy = DiffusionPolicy(DiffusionConfig(), panda_embodiment(), bounds)
    save_policy(folder, policy, training={"task": load_task(TASK).to_dict()})
    return folder


def measure_loops(policy: Path) -> dict[str, list[dict[str, Any]]]:
    """Timing of every episode, per arm, and what else is known about the run."""
    from simtoreal.envs import load_task, rollout
    from simtoreal.evaluation.policies import load_actor
    from simtoreal.robot.async_actor import AsyncPolicyActor
    from simtoreal.robot.deployment import CONTROL_PRIORITY, running_twin
    from simtoreal.robot.gate import SafetyGate
    from simtoreal.robot.gate_limits import GateLimits
    from simtoreal.robot.inference import InferenceProcess
    from simtoreal.robot.ros2_env import Ros2Env
    from simtoreal.robot.timing import realtime
    from simtoreal.robot.topics import load_robot_config

    task, robot = load_task(TASK), load_robot_config()
    inference = InferenceProcess(policy, device="cpu")
    embodiment = inference.description.embodiment
    _, inside = load_actor(policy, device="cpu")
    beside = AsyncPolicyActor(inference, embodiment)
    found: dict[str, list[dict[str, Any]]] = {"beside": [], "inside": []}
    log = Path(tempfile.mkdtemp()) / "twin.log"
    with running_twin(TASK, embodiment, "panda_ros2", gap="standard", seed=0, log=log):
        gate = SafetyGate.start(robot, GateLimits.for_embodiment(embodiment), embodiment)
        for round_number in range(ROUNDS):
            for name, actor in (("beside", beside), ("inside", inside)):
                # Threads keep the priority they were started with, so every arm has its own environment.
                with realtime(CONTROL_PRIORITY) if name == "beside" else contextlib.nullcontext():
                    env = Ros2Env(task, embodiment=embodiment, config=robot, gate=gate)
                    listeners = [beside] if name == "beside" else []
                    rollout(env, actor, [FIRST_SEED + round_number], listeners=listeners)  # type: ignore[arg-type]
                    found[name].append(env.clock.summary().to_dict())
                    env.close()
        status = gate.close()
    found["gate"] = [status.to_dict()]
    found["inference"] = [beside.statistics()]
    inference.close()
    return found


class PoseListener:
    """Keeps the time (s, system clock) and position (m) of every pose that the gate commands."""

    def __init__(self, robot: RobotConfig) -> None:
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node

        from simtoreal.robot.topics import start_ros

        self.poses: list[tuple[float, np.ndarray]] = []
        self._context = start_ros()
        self._node = Node("poses", context=self._context, use_global_arguments=False)
        # The gate's queue holds the newest pose only; here every one counts.
        topic = dataclasses.replace(robot.topics.target_pose, depth=200)
        self._node.create_subscription(topic.message_class(), topic.name, self._keep, topic.qos())
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)

    def _keep(self, message: Any) -> None:
        stamp, point = message.header.stamp, message.pose.position
        self.poses.append((stamp.sec + stamp.nanosec * 1e-9, np.array([point.x, point.y, point.z])))

    def motion(self) -> tuple[np.ndarray, np.ndarray]:
        """Times (s) of the poses but the first, and how far each is from the one before (m)."""
        positions = np.array([position for _, position in self.poses])
        return np.array([time_s for time_s, _ in self.poses[1:]]), np.linalg.norm(np.diff(positions, axis=0), axis=1)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Listen until ``condition``; gives up after ``PATIENCE_S``."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {PATIENCE_S:g} s; {len(self.poses)} poses were received")
            self._executor.spin_once(timeout_sec=0.05)

    def close(self) -> None:
        self._context.shutdown()
        self._executor.shutdown()
        self._node.destroy_node()


def run_until_killed() -> None:
    """The runtime that is killed: moves the arm of a running twin to and fro at full speed."""
    from simtoreal.envs import load_task, panda_embodiment
    from simtoreal.robot.gate import SafetyGate
    from simtoreal.robot.gate_limits import GateLimits
    from simtoreal.robot.ros2_env import Ros2Env
    from simtoreal.robot.topics import load_robot_config

    embodiment, robot = panda_embodiment(), load_robot_config()
    gate = SafetyGate.start(robot, GateLimits.for_embodiment(embodiment), embodiment)
    env = Ros2Env(load_task(TASK), embodiment=embodiment, config=robot, gate=gate, observe="state")
    _, info = env.reset(seed=FIRST_SEED)
    print(gate.pid, flush=True)
    action = np.array([0, 1, 0, 0, 0, 0, 1], dtype=np.float32)
    while True:
        if abs(info["target"][1] + 0.02 * action[1]) > 0.1:
            action[1] = -action[1]
        info = env.step(action)[4]


def measure_stops() -> list[float]:
    """Milliseconds from SIGKILL of a runtime in full motion until the last motion that the gate commands."""
    from simtoreal.envs import panda_embodiment
    from simtoreal.robot.deployment import running_twin
    from simtoreal.robot.topics import load_robot_config

    durations = []
    log = Path(tempfile.mkdtemp()) / "twin.log"
    listener = PoseListener(load_robot_config())
    with running_twin(TASK, panda_embodiment(), "panda_ros2", gap="none", seed=0, log=log):
        for number in range(KILLS):
            listener.poses.clear()
            runtime = subprocess.Popen([sys.executable, __file__, KILLED], stdout=subprocess.PIPE)
            assert runtime.stdout is not None
            gate = Path("/proc", str(int(runtime.stdout.readline())))
            # At another point of the control period and of the way every time.
            listener.wait_for(lambda: len(listener.poses) > 60 + 17 * number)  # noqa: B023 - used at once
            listener.wait_for(lambda: bool(listener.motion()[1][-1] > 0.0025))
            runtime.send_signal(signal.SIGKILL)
            killed_s = time.time()  # the poses carry the system's clock
            listener.wait_for(lambda: listener.poses[-1][0] > killed_s + 0.3 or not gate.exists())  # noqa: B023
            times, moved = listener.motion()
            durations.append(1000 * (float(times[moved > 0][-1]) - killed_s))
            runtime.wait()
            listener.wait_for(lambda: not gate.exists())  # noqa: B023
    listener.close()
    return durations


def main() -> None:
    """Run and store the measurement."""
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_loops(untrained_policy(Path(folder)))
    stops = measure_stops()
    ours = [episode["p99_period_error_ms"] for episode in found["beside"]]
    peer = [episode["p99_period_error_ms"] for episode in found["inside"]]
    ratios = sorted(b / a for a, b in zip(ours, peer, strict=True))
    gate, inference = found["gate"][0], found["inference"][0]

    def row(name: str, values: list[float]) -> dict[str, Any]:
        return {
            "name": name,
            "value": float(np.median(values)),
            "interval": [min(values), max(values)],
            "n": len(values),
        }

    path = write_benchmark(
        "control_loop",
        "Does a deployed 20 Hz loop keep its deadlines while twin, gate and inference share the machine?",
        {
            "metric": "p99 period error per episode, ms (ratio: baseline / ours)",
            "ours": float(np.median(ours)),
            "baseline": float(np.median(peer)),
            "baseline_name": "inference inside the loop, ordinary priority",
            "ratio": float(np.median(ratios)),
            "difference": None,
            "interval": [ratios[0], ratios[-1]],
            "n": len(ratios),
            "p_value": None,
        },
        [
            row("p99 period error, inference beside the loop (ms)", ours),
            row("p99 period error, inference inside the loop (ms)", peer),
            row("missed periods per episode, beside", [float(e["missed_periods"]) for e in found["beside"]]),
            row("missed periods per episode, inside", [float(e["missed_periods"]) for e in found["inside"]]),
            row("rest after SIGKILL of the runtime (ms)", stops),
            row("poses published per second", [gate["publish_hz"]]),
            row("p99 period error of the gate (ms)", [gate["timing"]["p99_period_error_ms"]]),
            row("inference p99 (ms)", [inference["inference_p99_ms"]]),
        ],
        seconds=time.perf_counter() - begin,
        seeds=[FIRST_SEED, FIRST_SEED + ROUNDS - 1],
        notes=f"{ROUNDS} rounds, one episode per arm; an executed chunk lasts {inference['executed_chunk_ms']:.0f} ms; "
        f"{inference['starved_steps']} of {inference['steps']} control steps had no action scheduled for them.",
    )
    print(path)


if __name__ == "__main__":
    if sys.argv[1:] == [KILLED]:
        run_until_killed()
    else:
        read_no_flags(__doc__)
        main()

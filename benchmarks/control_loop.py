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
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import write_benchmark

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the arm node of the gate's tests

TASK, ROUNDS, KILLS, FIRST_SEED = "pick_place", 8, 10, 300_000


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
    from simtoreal.commands.deploy import CONTROL_PRIORITY
    from simtoreal.envs import load_task, rollout
    from simtoreal.evaluation.policies import load_actor
    from simtoreal.robot.async_actor import AsyncPolicyActor
    from simtoreal.robot.deployment import running_twin
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


def measure_stops() -> list[float]:
    """Milliseconds from SIGKILL of a runtime in full motion until the last published motion."""
    from tests.test_gate_process import RUNTIME, ArmNode, wait_for

    root = Path(__file__).resolve().parent.parent
    durations = []
    arm = ArmNode()
    for number in range(KILLS):
        arm.poses.clear()
        runtime = subprocess.Popen([sys.executable, "-c", RUNTIME], stdout=subprocess.PIPE, cwd=root)
        assert runtime.stdout is not None
        gate_pid = int(runtime.stdout.readline())
        wait_for(lambda: len(arm.poses) > 60)
        time.sleep(0.037 * number % 0.4)
        wait_for(lambda: arm.motion()[1][-1] > 0.0025)
        killed_s = time.time_ns() * 1e-9  # poses carry the system's clock too
        runtime.send_signal(signal.SIGKILL)
        wait_for(lambda: arm.poses[-1][0] * 1e-9 > killed_s + 0.3)  # noqa: B023 - used at once
        stamps, moved = arm.motion()
        durations.append(1000 * (float(stamps[moved > 0][-1]) - killed_s))
        runtime.wait()
        wait_for(lambda: not Path(f"/proc/{gate_pid}").exists())  # noqa: B023
    arm.close()
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
    main()

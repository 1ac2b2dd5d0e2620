"""Running a policy on a robot: which processes there are, how an episode ends, and what is measured."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import RobotError
from simtoreal.envs.rollout import Observation
from simtoreal.robot.gate_messages import GateStatus
from simtoreal.robot.timing import TimingSummary

TWIN_STOP_TIMEOUT_S = 1.5
_PR_SET_PDEATHSIG = 1


def private_domain() -> int:
    """Return the ROS domain of this process and its children; one of its own unless the environment names one.

    Two deployments on one machine would otherwise move each other's twins.
    """
    return int(os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100)))


@contextlib.contextmanager
def running_twin(
    task: str, embodiment: Embodiment, topics: str, *, gap: str, seed: int, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``simtoreal twin`` in its own process; it ends with the context, or when this process dies.

    Args:
        task: name or yaml file.
        embodiment: gives image size and cameras.
        topics: preset or yaml file of the robot's topics.
        gap: reality gap, see ``simtoreal twin --help``.
        seed: initial condition before the first episode is asked for.
        log: its output goes here.

    Raises:
        RobotError: the embodiment is not one that the twin command can describe.
    """
    from simtoreal.envs.panda import panda_embodiment

    size = embodiment.cameras[0].height if embodiment.cameras else 64
    names = tuple(camera.name for camera in embodiment.cameras)
    wanted = panda_embodiment(size, cameras=names)
    differences = embodiment.differences(wanted)
    if differences:
        raise RobotError(f"the twin is a Panda with its default cameras; yours differs: {'; '.join(differences)}")
    command = [
        sys.executable, "-m", "simtoreal", "twin", "--task", task, "--gap", gap, "--seed", str(seed),
        "--image-size", str(size), "--topics", topics, "--cameras", *names,
    ]  # fmt: skip
    libc = ctypes.CDLL(None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        twin = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the runtime only, which stops the robot before the twin
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )
    try:
        yield twin
    finally:
        twin.terminate()
        try:
            twin.wait(TWIN_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            twin.kill()
            twin.wait()


class JudgedByOperator(gym.Wrapper):  # type: ignore[misc]
    """Asks a person at the end of every episode whether it succeeded: a real robot has no other judge.

    Args:
        env: ``Ros2Env``.
        judge: returns whether the episode that has just ended succeeded.
    """

    def __init__(self, env: gym.Env[Observation, np.ndarray], judge: Callable[[], bool]) -> None:
        super().__init__(env)
        self._judge = judge

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """See the wrapped environment; ``info["success"]`` of the last step is the judgement."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info = {**info, "success": self._judge()}
        return observation, float(reward), terminated, truncated, info


def control_results(clock: TimingSummary, status: GateStatus, actor: dict[str, Any]) -> dict[str, Any]:
    """What results.json says about the control loop.

    Args:
        clock: of the environment.
        status: final status of the gate.
        actor: statistics of the actor (may be empty).
    """
    return {
        **clock.to_dict(),
        **actor,
        "gate": {
            "fault_counts": status.fault_counts,
            "published": status.published,
            "publish_hz": status.publish_hz,
            "limited": status.limited,
            "timing": status.timing,
        },
    }


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into ``KeyboardInterrupt`` like Ctrl-C; restores the handlers afterwards."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deaf_to_signals() -> Iterator[Callable[[], None]]:
    """Yield a function after whose call further signals are ignored until the context ends.

    Called first when a deployment is left, so that a second Ctrl-C does not skip the controlled stop.
    """
    previous: dict[int, Any] = {}

    def ignore() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, signal.SIG_IGN)

    try:
        yield ignore
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

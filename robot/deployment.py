"""Running a policy on a robot: which processes there are, how an episode ends, and what is measured."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import RobotError, SafetyError
from simtoreal.envs.rollout import Listener, Observation, Step
from simtoreal.robot.gate import SafetyGate
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
        "--image-size", str(size), "--robot", topics, "--cameras", *names,
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


class EpisodeGuard(gym.Wrapper):  # type: ignore[misc]
    """Ends an episode as failed when the safety gate stops the arm, and lets somebody judge it.

    A stop because of what the policy did is a failure of this episode, not of the deployment. An emergency stop,
    or a gate that is gone, ends the deployment.

    Args:
        env: ``Ros2Env``.
        gate: asked why the arm was stopped.
        judge: called at the end of an episode, returns whether it succeeded; None: the twin has judged already.
    """

    def __init__(
        self, env: gym.Env[Observation, np.ndarray], gate: SafetyGate, judge: Callable[[], bool] | None
    ) -> None:
        super().__init__(env)
        self._gate, self._judge = gate, judge
        self._last: tuple[Observation, dict[str, Any]] = ({}, {})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See the wrapped environment."""
        self._last = self.env.reset(seed=seed, options=options)
        return self._last

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """See the wrapped environment.

        Raises:
            SafetyError: emergency stop, or the gate is gone.
        """
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except SafetyError as error:
            if self._gate.status().state != "stopped":
                raise
            observation, info = self._last
            reward, terminated, truncated = 0.0, False, True
            info = {**info, "success": False, "sim_fault": f"safety stop: {error}"}
        if self._judge is not None and (terminated or truncated):
            info = {**info, "success": self._judge()}
        self._last = observation, info
        return observation, float(reward), bool(terminated), bool(truncated), info


class CameraHeartbeat(Listener):
    """Tells the gate how old the images are that the policy goes by."""

    def __init__(self, gate: SafetyGate) -> None:
        self._gate = gate

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """Report the first images."""
        self._gate.report_observation(int(info["observation_ns"]))

    def on_step(self, step: Step) -> None:
        """Report the images that the next action goes by."""
        self._gate.report_observation(int(step.info["observation_ns"][0]))


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


def close_all(closers: Sequence[Callable[[], object]]) -> None:
    """Call everything in order, deaf to further signals: a second Ctrl-C must not skip the controlled stop."""
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.ExitStack() as stack:
            for close in reversed(closers):
                stack.callback(close)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

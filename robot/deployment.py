"""Running a policy on a robot: which processes there are, how an episode ends, and what is measured."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import RobotError, SafetyError
from simtoreal.envs.rollout import Observation
from simtoreal.robot.gate import SafetyGate
from simtoreal.robot.gate_limits import GateLimits
from simtoreal.robot.gate_messages import GateStatus
from simtoreal.robot.gate_rearm import RearmingGate
from simtoreal.robot.timing import TimingSummary
from simtoreal.robot.topics import RobotConfig, check_ros_environment

# Real-time priority of the control loop, where the system allows it; below the gate's.
CONTROL_PRIORITY = 10
TWIN_STOP_TIMEOUT_S = 1.5
LOG_LINES_SHOWN = 8
# An episode in which the twin skipped more is not what the policy would have met in real time.
TOLERATED_SKIP_S = 0.05
# The gate's word for a runtime that sent nothing for too long.
SILENT = "command_silent_stop"
_PR_SET_PDEATHSIG = 1
# Another Ctrl-C within this time is impatience; one after it, the wish to end what seems not to have heard.
SIGNAL_GAP_S = 2.0


def join_graph(robot: Literal["twin", "ros"]) -> None:
    """Choose the ROS graph of this process and its children.

    A robot is where the environment says (``ROS_DOMAIN_ID``, 0 by default). A twin gets a domain of its own on this
    machine, because it answers to the topics of the real arm: whoever exports the domain of one must not move it by
    testing on a twin, and two deployments must not move each other's twins. Only a domain that the environment limits
    to this machine (``ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST``) is used for a twin too.

    Raises:
        ConfigError: one of these variables is not valid.
    """
    check_ros_environment()
    named = os.environ.get("ROS_DOMAIN_ID")
    if robot == "ros" or (named and os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE") == "LOCALHOST"):
        return
    domain = 1 + os.getpid() % 100
    os.environ["ROS_DOMAIN_ID"] = str(domain if str(domain) != named else 1 + domain % 100)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"


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


def check_twin(twin: subprocess.Popen[bytes], log: Path) -> None:
    """Raise ``RobotError`` with the end of the twin's log if its process has ended."""
    if twin.poll() is None:
        return
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    raise RobotError(f"the twin has ended with status {twin.returncode}; {log} says:\n  " + "\n  ".join(lines))


@dataclass(frozen=True, kw_only=True)
class GuardedRobot:
    """A robot behind its running safety gate.

    Attributes:
        gate: the gate.
        targets: where an environment sends its targets: the gate, which a twin re-arms between episodes.
        check: raises ``RobotError`` if the twin's process has ended; None for a real robot.
    """

    gate: SafetyGate
    targets: SafetyGate | RearmingGate
    check: Callable[[], None] | None


@contextlib.contextmanager
def guarded_robot(
    config: RobotConfig,
    embodiment: Embodiment,
    *,
    twin: bool,
    task: str,
    topics: str,
    gap: str,
    seed: int,
    folder: Path,
) -> Iterator[GuardedRobot]:
    """Start the gate, and before it the twin if there is one; they end with the context, the gate first.

    Args:
        config: the robot.
        embodiment: gives the gate's limits, and the twin's cameras.
        twin: start a twin, instead of using the robot that is on the ROS graph.
        task, topics, gap, seed: of the twin, see :func:`running_twin`.
        folder: the twin's output goes to ``twin.log`` there.

    Raises:
        RobotError, SafetyError: the twin or the gate cannot be started.
    """
    with contextlib.ExitStack() as stack:
        check: Callable[[], None] | None = None
        if twin:
            log = folder / "twin.log"
            process = stack.enter_context(running_twin(task, embodiment, topics, gap=gap, seed=seed, log=log))
            check = functools.partial(check_twin, process, log)
        limits = GateLimits.for_embodiment(embodiment, config.limits)
        gate = SafetyGate.start(config, limits, embodiment, require_estop=config.require_estop and not twin)
        stack.callback(gate.close)
        yield GuardedRobot(gate=gate, targets=RearmingGate(gate, config) if twin else gate, check=check)


class JudgedByOperator(gym.Wrapper):  # type: ignore[misc]
    """Asks a person at the end of every episode without a fault whether it succeeded: a real robot has no other judge.

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
        # What a fault ended has failed, whatever it looks like.
        if (terminated or truncated) and not info["sim_fault"]:
            info = {**info, "success": self._judge()}
        return observation, float(reward), terminated, truncated, info


def twin_results(skipped_s: dict[int, float]) -> tuple[dict[str, Any], list[str]]:
    """What results.json says about a twin that was too slow, and notes about it.

    Args:
        skipped_s: time that the twin did not simulate, by episode.
    """
    slow = [seconds for seconds in skipped_s.values() if seconds > TOLERATED_SKIP_S]
    notes = []
    if slow:
        notes.append(
            f"the machine was too slow for the twin: it skipped up to {max(slow):.2f} s in {len(slow)} of "
            f"{len(skipped_s)} episodes, so the arm had less time than a real one"
        )
    return {"twin_skipped_s": sum(skipped_s.values())}, notes


class GroupedFaults(gym.Wrapper):  # type: ignore[misc]
    """Names faults by their kind, so that they can be counted; the text with its numbers is kept in ``details``.

    Args:
        env: ``Ros2Env``.
        gate: its gate.
    """

    def __init__(self, env: gym.Env[Observation, np.ndarray], gate: SafetyGate) -> None:
        super().__init__(env)
        self._gate = gate
        self._seed: int | None = None
        self.details: list[str] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See the wrapped environment."""
        self._seed = seed
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """See the wrapped environment; ``info["sim_fault"]`` is ``gate:<kind>``, or the fault without numbers."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        fault = info["sim_fault"]
        if fault:
            self.details.append(f"seed {self._seed}: {fault}")
            tag = re.sub(r"\d+(\.\d+)?", "#", fault)
            with contextlib.suppress(SafetyError):  # a gate that is gone is reported by the next episode
                kind = self._gate.status().kind
                # Nothing is sent while an input is bad. That the gate then misses it is no cause.
                tag = tag if not kind or (info["robot_fault"] and kind == SILENT) else f"gate:{kind}"
            info = {**info, "sim_fault": tag}
        return observation, float(reward), terminated, truncated, info


def control_results(
    clock: TimingSummary, status: GateStatus, actor: dict[str, Any], *, realtime: bool, faults: list[str]
) -> dict[str, Any]:
    """What results.json says about the control loop.

    Args:
        clock: of the environment.
        status: final status of the gate.
        actor: statistics of the actor (may be empty).
        realtime: whether the control loop was granted real-time scheduling.
        faults: texts of the faults that ended episodes.
    """
    return {
        **clock.to_dict(),
        **actor,
        "realtime": {"control": realtime, "gate": status.realtime},
        "faults": faults,
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
    """Turn SIGINT (Ctrl-C) and SIGTERM into ``KeyboardInterrupt``, but not again and again.

    A second Ctrl-C would otherwise skip the controlled stop: while the first is still on its way up to
    :func:`deaf_to_signals`, or when the interpreter is already ending. One that comes later than a moment is heard
    again, since an exception may get lost (in ``__del__``, for instance). Without an interruption the handlers are
    restored; after one the process is about to end, and deaf.
    """
    heard: float | None = None

    def interrupt(number: int, frame: Any) -> None:
        nonlocal heard
        now = time.monotonic()
        if heard is None or now - heard > SIGNAL_GAP_S:
            heard = now
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if heard is None else signal.SIG_IGN)


@contextlib.contextmanager
def deaf_to_signals() -> Iterator[Callable[[], None]]:
    """Yield a function after whose call signals are ignored until the context ends, and after an interruption for good.

    Called first when a deployment is left, so that a Ctrl-C just after its last episode does not skip the controlled
    stop either.
    """
    previous: dict[int, Any] = {}

    def ignore() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, signal.SIG_IGN)

    def hear() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        yield ignore
    except KeyboardInterrupt:
        # On the way out of the process, whose stop may have taken long: hearing the next Ctrl-C now would raise another
        # interruption where none is expected.
        raise
    except BaseException:
        hear()
        raise
    else:
        hear()

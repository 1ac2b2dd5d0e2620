"""The safety gate, as the runtime sees it. ``python -m simtoreal.robot.gate`` is its process.

The gate is not safety-rated hardware: it is defence in depth, and no replacement for a hardware emergency stop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import subprocess
import sys
import time

import numpy as np

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import SafetyError
from simtoreal.robot.gate_limits import GateLimits
from simtoreal.robot.gate_messages import ARM, CLOSE, MAX_BYTES, REST, TARGET, WATCH, GateStatus, Request
from simtoreal.robot.topics import RobotConfig

START_TIMEOUT_S = 30.0
ARM_TIMEOUT_S = 5.0
RETRY_S = 0.02
ANSWER_TIMEOUT_S = 0.5
STATUS_AGE_S = 0.25
CLOSE_TIMEOUT_S = 2.0


class SafetyGate:
    """Handle of a gate process; make one with :meth:`start`. Not thread-safe.

    The process notices by itself when this one dies or falls silent, and brings the robot to rest. It publishes
    nothing before the first target, and targets only after :meth:`begin_episode`.
    """

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._process, self._channel = process, channel
        self._sequence = 0
        self._observation_ns = 0
        self._status = GateStatus(state="idle", reason="the gate is starting")
        self._closed = False

    @classmethod
    def start(
        cls, config: RobotConfig, limits: GateLimits, embodiment: Embodiment, *, require_estop: bool = False
    ) -> SafetyGate:
        """Start the process and wait until it is on the ROS graph.

        Args:
            config: topics and staleness limits.
            limits: motion limits; usually ``GateLimits.for_embodiment(embodiment, config.limits)``.
            embodiment: robot model, workspace and control rate.
            require_estop: refuse to arm until the emergency stop has said that it is not pressed, and stop when its
                publisher vanishes.

        Raises:
            SafetyError: the process does not come up.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "simtoreal.robot.gate", "--descriptor", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal must not end the gate before the robot rests
            )
        gate = cls(process, ours)
        setup = {
            "config": dataclasses.asdict(config),
            "limits": dataclasses.asdict(limits),
            "embodiment": embodiment.to_dict(),
            "require_estop": require_estop,
        }
        try:
            ours.send(json.dumps(setup).encode())
            gate._wait_for_status(START_TIMEOUT_S)
        except SafetyError:
            process.kill()
            ours.close()
            raise
        return gate

    @property
    def pid(self) -> int:
        """Process id of the gate."""
        return self._process.pid

    def watch(self, process: int) -> None:
        """Stop the robot at once when the process with this id dies (the one that computes the actions)."""
        self._send(Request(WATCH, self._next(), extra=process))

    def begin_episode(self, episode: int = 0, *, timeout_s: float = ARM_TIMEOUT_S) -> None:
        """Arm: targets of ``episode`` count from now on, starting from the measured pose at the first of them.

        Waits until earlier motion has stopped and all inputs are fresh. A latched stop is not released by this, but
        only by the re-arm service.

        Args:
            episode: id that :meth:`send_target` repeats.
            timeout_s: how long to wait.

        Raises:
            SafetyError: the gate refuses; the message says why.
        """
        # What was seen before, perhaps minutes ago, says nothing about the cameras now.
        self._observation_ns = 0
        deadline = time.monotonic() + timeout_s
        while True:
            self._send(Request(ARM, self._next(), episode=episode))
            while self._status.handled < self._sequence:
                self._wait_for_status(ANSWER_TIMEOUT_S)
            if not self._status.refusal:
                return
            if self._status.latched or time.monotonic() > deadline:
                raise SafetyError(f"the safety gate refuses to arm: {self._status.refusal}")
            time.sleep(RETRY_S)

    def report_observation(self, observation_ns: int) -> None:
        """Tell when the oldest camera image in use arrived (monotonic ns); goes along with the next target.

        Once reported, the gate holds when it gets older than ``staleness.camera_s``, until :meth:`begin_episode`.
        """
        self._observation_ns = int(observation_ns)

    def send_target(self, target: np.ndarray, at_ns: int, episode: int = 0) -> None:
        """Ask to be at ``target`` at ``at_ns``; every value is checked by the gate.

        Args:
            target: ``(10,)`` float64, ``TARGET_NAMES``: position (m), 6-D rotation, gripper opening 0..1.
            at_ns: monotonic time at which it should be reached, usually the end of this control period.
            episode: as given to :meth:`begin_episode`; targets of other episodes are dropped.

        Raises:
            SafetyError: the gate has stopped the robot (with the reason), or is gone, or the shape is wrong.
        """
        values = np.asarray(target, dtype=np.float64)
        if values.shape != (10,):
            raise SafetyError(f"target has shape {values.shape}; expected (10,)")
        request = Request(TARGET, self._next(), int(at_ns), int(episode), self._observation_ns, tuple(values.tolist()))
        self._send(request)
        self._drain()
        if self._status.state not in ("armed", "hold"):
            raise SafetyError(f"the safety gate is {self._status.state}: {self._status.reason}")

    def holding(self) -> str:
        """Why the arm is held although targets come, or an empty string; targets must not get ahead of it meanwhile.

        They must still be sent: a gate that misses them holds for that reason, and goes on with the next one.

        Raises:
            SafetyError: the gate is gone.
        """
        self._drain()
        return "" if self._status.late_input in ("", "command_silent") else f"the gate holds: {self._status.reason}"

    def end_episode(self) -> None:
        """Bring the robot to rest because the episode is over: the silence that follows is no fault.

        Raises:
            SafetyError: the gate is gone.
        """
        self._send(Request(REST, self._next()))

    def status(self) -> GateStatus:
        """Newest status, at most a quarter of a second old.

        Raises:
            SafetyError: the gate is gone or does not answer.
        """
        self._drain()
        if time.monotonic_ns() - self._status.stamp_ns > STATUS_AGE_S * 1e9:
            self._wait_for_status(ANSWER_TIMEOUT_S)
        return self._status

    def close(self) -> GateStatus:
        """Bring the robot to rest and end the process; returns the final status, with timing. May be repeated."""
        if self._closed:
            return self._status
        self._closed = True
        try:
            self._send(Request(CLOSE, self._next()))
            while self._status.timing is None:
                self._wait_for_status(CLOSE_TIMEOUT_S)
        except SafetyError as error:
            if self._status.timing is None:
                self._status = dataclasses.replace(self._status, state="stopped", reason=str(error))
        # Closing the socket makes a gate that did not answer stop on its own.
        self._channel.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self._status

    # ---- the socket

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _send(self, request: Request) -> None:
        try:
            self._channel.send(request.pack(), socket.MSG_DONTWAIT)
        except BlockingIOError as error:
            raise SafetyError("the safety gate does not read its messages any more; it has hung") from error
        except OSError as error:
            raise SafetyError(f"the safety gate (process {self.pid}) is gone: {error}") from error

    def _drain(self) -> None:
        newest = b""
        try:
            while content := self._channel.recv(MAX_BYTES, socket.MSG_DONTWAIT):
                newest = content
            raise SafetyError(f"the safety gate (process {self.pid}) has ended")
        except BlockingIOError:
            return
        except OSError as error:
            raise SafetyError(f"the safety gate (process {self.pid}) is gone: {error}") from error
        finally:
            if newest:
                self._status = GateStatus.from_json(newest)

    def _wait_for_status(self, timeout_s: float) -> None:
        """Wait for one more status, and read all there are."""
        self._channel.settimeout(timeout_s)
        try:
            content = self._channel.recv(MAX_BYTES)
        except TimeoutError as error:
            raise SafetyError(f"the safety gate (process {self.pid}) does not answer for {timeout_s:g} s") from error
        except OSError as error:
            raise SafetyError(f"the safety gate (process {self.pid}) is gone: {error}") from error
        finally:
            self._channel.settimeout(None)
        if not content:
            raise SafetyError(
                f"the safety gate (process {self.pid}) has died with exit code {self._process.poll()}; "
                "see its message above"
            )
        self._status = GateStatus.from_json(content)
        self._drain()


def main() -> None:
    """Entry point of the gate's process."""
    parser = argparse.ArgumentParser(description="Process of the safety gate; started by the runtime.")
    parser.add_argument("--descriptor", type=int, required=True, help="inherited socket to the runtime")
    from simtoreal.robot.gate_node import run_gate

    run_gate(parser.parse_args().descriptor)


if __name__ == "__main__":
    main()

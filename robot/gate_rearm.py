"""Gate and twin in automated evaluations: stops end the episode, not the evaluation. Never used with a real arm."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from simtoreal.envs.errors import RobotError, SafetyError
from simtoreal.robot.gate import SafetyGate
from simtoreal.robot.topics import RobotConfig, start_ros

SERVICE_TIMEOUT_S = 5.0
RETRY_S = 0.1


class RearmingGate:
    """A safety gate in front of a twin, re-armed between episodes after latched faults; target sink of the env.

    A pressed emergency stop stays: somebody wanted that.

    Args:
        gate: the gate.
        config: names of the services.
    """

    def __init__(self, gate: SafetyGate, config: RobotConfig) -> None:
        self._gate, self._config = gate, config

    def begin_episode(self, episode: int) -> None:
        """See :meth:`SafetyGate.begin_episode`; a latched fault is released first, and the twin's arm put home.

        Raises:
            SafetyError: the gate refuses.
        """
        status = self._gate.status()
        if status.latched and status.state == "stopped":
            # The gate first: it publishes nothing any more when the twin puts its arm back.
            _trigger(self._config.services.gate_rearm)
            _trigger(self._config.services.twin_reset)
        self._gate.begin_episode(episode)

    def report_observation(self, observation_ns: int) -> None:
        """See :meth:`SafetyGate.report_observation`."""
        self._gate.report_observation(observation_ns)

    def holding(self) -> str:
        """See :meth:`SafetyGate.holding`."""
        return self._gate.holding()

    def end_episode(self) -> None:
        """See :meth:`SafetyGate.end_episode`."""
        self._gate.end_episode()

    def send_target(self, target: np.ndarray, at_ns: int, episode: int) -> None:
        """See :meth:`SafetyGate.send_target`."""
        self._gate.send_target(target, at_ns, episode)


def _trigger(name: str) -> None:
    """Call a ``std_srvs/srv/Trigger`` service until it agrees.

    Raises:
        RobotError: nobody offers it, or it refuses for too long.
    """
    context = start_ros()
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node
    from std_srvs.srv import Trigger

    node = Node("simtoreal_rearm", context=context, use_global_arguments=False)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        client = node.create_client(Trigger, name)
        deadline = time.monotonic() + SERVICE_TIMEOUT_S
        if not client.wait_for_service(SERVICE_TIMEOUT_S):
            raise RobotError(f"nobody offers the service {name}")
        while True:
            future: Any = client.call_async(Trigger.Request())
            executor.spin_until_future_complete(future, SERVICE_TIMEOUT_S)
            if future.done() and future.result().success:
                return
            if time.monotonic() > deadline:
                why = future.result().message if future.done() else "no answer"
                raise SafetyError(f"the service {name} refuses: {why}")
            time.sleep(RETRY_S)
    finally:
        executor.shutdown()
        node.destroy_node()
        context.shutdown()

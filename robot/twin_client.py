"""Asks the twin for episodes and reads its truth."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from simtoreal.envs.errors import RobotError, StaleObservationError
from simtoreal.envs.scene_motion import SceneMotion
from simtoreal.robot.inputs import RobotInputs
from simtoreal.robot.topics import RobotConfig

TWIN_TIMEOUT_S = 10.0
TWIN_RETRY_S = 0.5


class TwinClient:
    """The other end of ``simtoreal twin``: what it is told and what it tells, on the topics of ``config``."""

    def __init__(self, inputs: RobotInputs, config: RobotConfig) -> None:
        self._inputs = inputs
        self._topic = config.topics.twin_command
        inputs.listen("twin_truth", config.topics.twin_truth)
        self._publisher = inputs.node.create_publisher(self._topic.message_class(), self._topic.name, self._topic.qos())
        self._request = ""
        self._parsed: tuple[Any, dict[str, Any]] = (None, {})

    def truth(self) -> dict[str, Any]:
        """Newest truth of the current request; empty before the twin has answered."""
        found = self._inputs.newest("twin_truth")
        if found is None:
            return {}
        if found[0] is not self._parsed[0]:
            self._parsed = found[0], json.loads(found[0].data)
        return self._parsed[1] if self._parsed[1].get("request") == self._request else {}

    def reset(self, episode: int, seed: int, task: str, motion: SceneMotion | None) -> None:
        """Ask for an episode and wait until the twin runs it.

        Raises:
            StaleObservationError: no answer.
            RobotError: the twin refuses, e.g. because it runs another task.
        """
        self._request = uuid.uuid4().hex
        content = {"request": self._request, "episode": episode, "seed": seed, "task": task}
        if motion is not None:
            content["motion"] = motion.to_dict()
        message = self._topic.message_class()()
        message.data = json.dumps(content)
        begin = time.monotonic_ns()
        sent = 0
        while not (truth := self.truth()):
            self._inputs.check_robot()
            now = time.monotonic_ns()
            if (now - begin) * 1e-9 > TWIN_TIMEOUT_S:
                raise StaleObservationError(
                    f"no twin answers on {self._topic.name} after {TWIN_TIMEOUT_S:g} s. "
                    f"Start one with: simtoreal twin --task {task}  (same ROS_DOMAIN_ID)"
                )
            if (now - sent) * 1e-9 > TWIN_RETRY_S:
                # Not repeated blindly: the twin ignores a request that it has already served.
                self._publisher.publish(message)
                sent = now
            time.sleep(0.002)
        if truth["error"]:
            raise RobotError(f"the twin refuses the episode: {truth['error']}")

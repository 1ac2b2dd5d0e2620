"""A policy whose inference runs beside the control loop instead of inside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.action import action_towards, integrate_action
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import RobotError
from simtoreal.envs.rollout import Listener, Observation, Step
from simtoreal.robot.chunk_schedule import ChunkSchedule
from simtoreal.robot.gate_limits import rotation_between
from simtoreal.robot.inference import InferenceProcess, chunk_to_targets

# A new chunk takes over from the previous one within this many control steps.
BLEND_STEPS = 3
# Targets that differ by less, in metres and radians, are the same.
SAME_TARGET = 1e-6
# A target that limits hold back counts as reached when less than this share of its last step is left.
REACHED_SHARE = 0.5


class AsyncPolicyActor(Listener):
    """Actor of one real-time environment. Pass it to :func:`rollout` as a listener too: it follows the target.

    At every control step it takes a finished chunk, places it on the time axis (:class:`ChunkSchedule`), hands the
    newest observations to the inference process when a new chunk is due, and returns the action towards the target
    that is scheduled for now. When there is none, it holds; it never waits.

    The schedule goes on only as far as the arm does. While an input is stale nothing is sent, and with slower limits of
    the gate a step takes the target only part of the way: by the clock alone the fingers would then close where the arm
    should be, but is not yet, and what it missed would never be done.

    Args:
        inference: a started process.
        embodiment: of the environment.
    """

    execute_steps = 1
    ensembling = None

    def __init__(self, inference: InferenceProcess, embodiment: Embodiment) -> None:
        policy = inference.description
        self.inference, self.embodiment = inference, embodiment
        self.observation_steps = policy.observation_steps
        self._request_every = policy.execute_steps
        period_ns = round(embodiment.control_period_s * 1e9)
        self.schedule = ChunkSchedule(period_ns, blend_steps=BLEND_STEPS, max_age_ns=policy.horizon * period_ns)
        self.steps = self.starved_steps = self.waiting_steps = self.paused_steps = 0
        self._episode = 0
        self._seed: int | None = None
        self._since_request: int | None = None
        self._moving = self._held = False
        self._target = self._goal = np.zeros(10)

    # ---- listener: the absolute target is in the info of every step

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """Take over the target at the beginning of the episode."""
        self._target, self._held = np.array(info["target"]), False

    def on_step(self, step: Step) -> None:
        """Take over the target after the step; when the arm could not follow, the schedule waits for it."""
        before, self._target = self._target, np.array(step.info["target"][0])
        wanted = integrate_action(before, step.action[0], self.embodiment)
        if self._held or _held_back(before, wanted, self._target, self._goal):
            self.paused_steps += 1
            self.schedule.pause(self.schedule.period_ns)
        # What the robot holds because of is found at the end of a step, and keeps the next one from being sent.
        self._held = bool(step.info["robot_fault"][0])

    # ---- actor

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """Begin an episode; what is still being computed for the previous one will be dropped."""
        if len(slots) != 1:
            raise RobotError(f"one robot runs one episode at a time, not {len(slots)}")
        self._episode += 1
        self.schedule.begin(self._episode)
        self._seed, self._since_request, self._moving = int(seeds[0]), None, False

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """Return the action ``(1, 1, action_dim)`` for the control step that begins now.

        Raises:
            RobotError: the inference process has died.
            ActionError: the policy returned something that must not be executed.
        """
        now_ns = time.monotonic_ns()
        self.steps += 1
        self._collect(now_ns)
        if self._since_request is not None:
            self._since_request += 1
        due = self._since_request is None or self._since_request >= self._request_every
        # An observation that is repeated because an input is stale is none to act on.
        if due and not self._held and not self.inference.busy:
            single = {key: value[0] for key, value in observation.items()}
            tag = (self._episode, now_ns, self._target.copy(), self.schedule.paused_ns)
            self.inference.request(single, instructions[0], tag=tag, new_seed=self._seed)
            self._seed, self._since_request = None, 0
        goal = self.schedule.target_at(now_ns)
        if goal is None:
            if self._moving:
                self.starved_steps += 1
            else:
                self.waiting_steps += 1
            goal = self._target
        else:
            self._moving = True
        self._goal = goal
        if self.embodiment.action.mode == "ee_abs":
            return goal.astype(np.float32)[None, None]
        return action_towards(self._target, goal, self.embodiment)[None, None]

    def _collect(self, now_ns: int) -> None:
        prediction = self.inference.poll()
        if prediction is None:
            return
        episode, observation_ns, target, paused_ns = prediction.tag
        targets = chunk_to_targets(prediction.actions, target, self.embodiment)
        held = np.array_equal(target, self._target) and now_ns - observation_ns <= self.schedule.max_age_ns
        # While the arm held its target nothing of the chunk was missed, so it begins at its beginning. Otherwise its
        # first actions belong to the time that has passed.
        if held:
            self.schedule.add(targets, now_ns, episode, now_ns)
        else:
            self.schedule.add(targets, observation_ns, episode, now_ns, paused_ns=paused_ns)

    def statistics(self) -> dict[str, Any]:
        """Numbers for results.json: latency of inference, steps without a scheduled action, dropped chunks."""
        latencies_ms = np.array(self.inference.latencies_ns or [0]) * 1e-6
        p50, p99 = np.percentile(latencies_ms, [50, 99])
        return {
            "inference_count": len(self.inference.latencies_ns),
            "inference_p50_ms": float(p50),
            "inference_p99_ms": float(p99),
            "inference_max_ms": float(latencies_ms.max()),
            "executed_chunk_ms": 1000 * self._request_every * self.embodiment.control_period_s,
            "steps": self.steps,
            "starved_steps": self.starved_steps,
            "waiting_steps": self.waiting_steps,
            "paused_steps": self.paused_steps,
            "dropped_chunks": dict(self.schedule.dropped),
        }


def _held_back(before: np.ndarray, wanted: np.ndarray, reached: np.ndarray, goal: np.ndarray) -> bool:
    """Whether limits kept a step from ``before`` to ``wanted``, and ``reached`` leaves much of the way to ``goal``.

    All are targets ``(10,)``. Position and rotation have limits of their own.
    """
    if np.abs(reached - wanted).max() <= SAME_TARGET:
        return False
    return any(
        distance(reached, goal) > REACHED_SHARE * distance(before, reached)
        for distance in (_move_m, _turn_rad)
        if distance(reached, wanted) > SAME_TARGET
    )


def _move_m(start: np.ndarray, end: np.ndarray) -> float:
    return float(np.linalg.norm(end[:3] - start[:3]))


def _turn_rad(start: np.ndarray, end: np.ndarray) -> float:
    return float(np.linalg.norm(rotation_between(rotation.from_6d(start[3:9]), rotation.from_6d(end[3:9]))))

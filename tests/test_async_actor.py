"""A policy beside the control loop: what is executed when the arm holds, or is slower than the policy."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simtoreal.envs import panda_embodiment
from simtoreal.robot import async_actor
from simtoreal.robot.async_actor import AsyncPolicyActor
from simtoreal.robot.gate_limits import MotionLimits
from simtoreal.robot.inference import Prediction
from simtoreal.robot.ros2_env import Ros2Env

EMBODIMENT = panda_embodiment()
PERIOD_NS = 50_000_000
START = np.array([0.5, 0.0, 0.2, 1, 0, 0, 0, -1, 0, 1.0])
BOTTOM_M = 0.08
DOWN, CLOSE, UP = ([0, 0, -1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, -1], [0, 0, 1, 0, 0, 0, -1])


def grasp(observation: np.ndarray) -> np.ndarray:
    """Chunk ``(16, 7)``: down to the bottom from the target in ``observation``, close, up."""
    whole, rest = divmod(max(0.0, observation[2] - BOTTOM_M) / 0.02, 1)
    down = [DOWN] * int(whole) + [[0, 0, -rest, 0, 0, 0, 1]]
    return np.array((down + [CLOSE] * 3 + [UP] * 16)[:16], dtype=np.float32)


class Inference:
    """Answers one control step after it was asked."""

    def __init__(self, policy: Callable[[np.ndarray], np.ndarray], execute_steps: int) -> None:
        self.description = SimpleNamespace(observation_steps=1, horizon=16, execute_steps=execute_steps)
        self.busy, self.latencies_ns = False, [1]
        self.asked: list[np.ndarray] = []
        self._policy = policy

    def request(self, observation: dict[str, np.ndarray], _: str, *, tag: Any, new_seed: int | None = None) -> None:
        self.busy, self.tag = True, tag
        self.asked.append(observation["target"][0])

    def poll(self) -> Prediction | None:
        if not self.busy:
            return None
        self.busy = False
        return Prediction(actions=self._policy(self.asked[-1]), tag=self.tag, latency_ns=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now_ns=10**10)
    monkeypatch.setattr(async_actor, "time", SimpleNamespace(monotonic_ns=lambda: made.now_ns))
    return made


def run(
    clock: SimpleNamespace, inference: Inference, steps: int, *, stale_after: Collection[int] = (), **limits: float
) -> tuple[np.ndarray, AsyncPolicyActor]:
    """Targets ``(steps, 10)`` of an episode on a robot with these limits; an input is stale after the given steps."""
    actor = AsyncPolicyActor(inference, EMBODIMENT)  # type: ignore[arg-type]
    arm: Any = SimpleNamespace(embodiment=EMBODIMENT, config=SimpleNamespace(limits=MotionLimits(**limits)))
    target, fault, path = START, "", []
    actor.reset(np.array([0]), [0])
    actor.on_reset(0, 0, 0, {}, {"target": target})
    for step in range(steps):
        action = actor.act({"target": target[None, None]}, ["grasp it"], np.array([0]))[0, 0]
        if not fault:
            target = Ros2Env._next_target(arm, target, action)
        fault = "a camera is silent" if step in stale_after else ""
        info = {"target": target[None].copy(), "robot_fault": np.array([fault], dtype=object)}
        actor.on_step(SimpleNamespace(info=info, action=action[None]))  # type: ignore[arg-type]
        path.append(target)
        clock.now_ns += PERIOD_NS
    return np.array(path), actor


def closes_at(path: np.ndarray) -> float:
    assert (path[:, 9] == 0).any()
    return float(path[path[:, 9].argmin(), 2])


def test_an_arm_that_keeps_up_is_never_waited_for(clock) -> None:
    path, actor = run(clock, Inference(grasp, 16), 15)
    assert closes_at(path) == pytest.approx(BOTTOM_M)
    assert 7 <= np.argmin(path[:, 9]) <= 8, "one step of inference, six down"
    assert actor.statistics()["paused_steps"] == 0


@pytest.mark.parametrize("held_steps", [1, 3])
@pytest.mark.parametrize("begin", [2, 5, 7])
def test_nothing_of_a_chunk_is_left_out_because_the_arm_held(clock, begin: int, held_steps: int) -> None:
    plain, _ = run(clock, Inference(grasp, 30), 14)
    held, actor = run(clock, Inference(grasp, 30), 14 + held_steps, stale_after=range(begin, begin + held_steps))
    assert actor.statistics()["paused_steps"] == held_steps
    np.testing.assert_allclose(np.delete(held, range(begin + 1, begin + 1 + held_steps), axis=0), plain, atol=1e-6)


@pytest.mark.parametrize("held_steps", [1, 4, 8, 15, 19])
@pytest.mark.parametrize("begin", range(2, 9))
def test_after_a_hold_the_fingers_close_where_they_should(clock, begin: int, held_steps: int) -> None:
    path, _ = run(clock, Inference(grasp, 8), 50, stale_after=range(begin, begin + held_steps))
    assert closes_at(path) == pytest.approx(BOTTOM_M)


def test_a_chunk_is_not_resumed_when_its_observation_is_too_old(clock) -> None:
    path, actor = run(clock, Inference(grasp, 100), 30, stale_after=range(2, 20))
    np.testing.assert_array_equal(path[3:], np.broadcast_to(path[3], path[3:].shape))
    assert actor.statistics()["starved_steps"] > 0


def test_nobody_is_asked_what_to_do_about_an_observation_that_is_only_repeated(clock) -> None:
    inference = Inference(grasp, 4)
    run(clock, inference, 3, stale_after=range(2, 30))
    asked = len(inference.asked)
    inference = Inference(grasp, 4)
    run(clock, inference, 30, stale_after=range(2, 30))
    assert len(inference.asked) == asked


@pytest.mark.parametrize("speed_m_s", [0.05, 0.1, 0.25, 0.35])
def test_with_slower_limits_the_fingers_close_where_they_should(clock, speed_m_s: float) -> None:
    path, _ = run(clock, Inference(grasp, 8), 90, max_speed_m_s=speed_m_s)
    step_m = speed_m_s * EMBODIMENT.control_period_s
    assert closes_at(path) == pytest.approx(BOTTOM_M, abs=step_m)
    assert np.abs(np.diff(path[:, 2])).max() <= step_m


def test_slower_limits_do_not_cut_corners(clock) -> None:
    def corner(observation: np.ndarray) -> np.ndarray:
        if observation[2] > BOTTOM_M + 0.01:
            return np.array(([DOWN] * round((observation[2] - BOTTOM_M) / 0.02) + [[0, 1, 0, 0, 0, 0, 1]] * 16)[:16])
        return np.tile([0, 1, 0, 0, 0, 0, 1], (16, 1))

    path, _ = run(clock, Inference(lambda seen: corner(seen).astype(np.float32), 8), 60, max_speed_m_s=0.1)
    beside = path[:, 1] > 0.005
    assert beside.any()
    assert path[beside, 2].max() < BOTTOM_M + 0.01

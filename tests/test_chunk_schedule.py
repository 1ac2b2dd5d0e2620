"""Chunks on the time axis: late, reordered, duplicated and foreign ones, and what is executed when."""

from __future__ import annotations

import numpy as np
import pytest

from simtoreal.envs import panda_embodiment
from simtoreal.envs.action import action_towards, integrate_action
from simtoreal.envs.errors import ActionError
from simtoreal.robot.chunk_schedule import ChunkSchedule
from simtoreal.robot.inference import chunk_to_targets

PERIOD = 50_000_000
HORIZON = 16
EMBODIMENT = panda_embodiment()
START = np.array([0.5, 0.0, 0.2, 1, 0, 0, 0, -1, 0, 1.0])


def schedule(blend_steps: int = 1, max_age_steps: int = HORIZON) -> ChunkSchedule:
    made = ChunkSchedule(PERIOD, blend_steps=blend_steps, max_age_ns=max_age_steps * PERIOD)
    made.begin(1)
    return made


def numbered(first: float, horizon: int = HORIZON) -> np.ndarray:
    """Targets whose x says which action they are."""
    targets = np.tile(START, (horizon, 1))
    targets[:, 0] = first + np.arange(horizon)
    return targets


def test_actions_are_executed_at_their_time_with_jitter() -> None:
    plan, rng = schedule(), np.random.default_rng(0)
    assert plan.add(numbered(0), 0, 1, 0)
    for step in range(HORIZON):
        now = step * PERIOD + int(rng.integers(-PERIOD // 3, PERIOD // 3)) * (step > 0)
        assert plan.target_at(now)[0] == step
    assert plan.target_at(HORIZON * PERIOD) is None


@pytest.mark.parametrize("late_steps", [1, 5, 15])
def test_a_late_chunk_starts_in_its_middle(late_steps: int) -> None:
    plan = schedule()
    now = late_steps * PERIOD
    assert plan.add(numbered(0), 0, 1, now)
    assert plan.target_at(now)[0] == late_steps


@pytest.mark.parametrize("late_steps", [16, 17, 1000])
def test_a_chunk_that_is_too_late_is_dropped_whole_and_never_jumped_to_its_end(late_steps: int) -> None:
    plan = schedule()
    now = late_steps * PERIOD
    assert not plan.add(numbered(0), 0, 1, now)
    assert plan.target_at(now) is None
    assert plan.dropped == {"too_late": 1}


def test_reordered_duplicated_foreign_and_future_chunks_are_dropped() -> None:
    plan = schedule()
    assert plan.add(numbered(100), 4 * PERIOD, 1, 5 * PERIOD)
    assert not plan.add(numbered(0), 2 * PERIOD, 1, 5 * PERIOD)
    assert not plan.add(numbered(200), 4 * PERIOD, 1, 5 * PERIOD)
    assert not plan.add(numbered(300), 9 * PERIOD, 1, 5 * PERIOD)
    assert not plan.add(numbered(400), 5 * PERIOD, 0, 5 * PERIOD)
    assert plan.dropped == {"out_of_order": 3, "other_episode": 1}
    assert plan.target_at(5 * PERIOD)[0] == 101
    plan.begin(2)
    assert plan.target_at(5 * PERIOD) is None


def test_nothing_older_than_the_bound_is_executed_under_random_delays() -> None:
    rng = np.random.default_rng(3)
    plan = schedule(blend_steps=3, max_age_steps=10)
    arrivals: list[tuple[int, int]] = []
    executed = 0
    for step in range(5000):
        if rng.random() < 0.2:
            arrivals.append((step + int(rng.pareto(1.0) * 3), step))
        for due, observed in [entry for entry in arrivals if entry[0] == step]:
            # x is the step at which an action should be executed, so x - step is its error in time.
            plan.add(numbered(observed), observed * PERIOD, 1, step * PERIOD)
            arrivals.remove((due, observed))
        target = plan.target_at(step * PERIOD)
        if target is not None:
            executed += 1
            assert abs(target[0] - step) < 1e-9
    assert executed > 1000
    assert plan.dropped["too_late"] > 0


def test_a_new_chunk_takes_over_gradually_but_the_gripper_at_once() -> None:
    plan = schedule(blend_steps=4)
    old, new = np.tile(START, (HORIZON, 1)), np.tile(START, (HORIZON, 1))
    new[:, 1], new[:, 9] = 0.1, 0.0
    plan.add(old, 0, 1, 0)
    plan.add(new, 4 * PERIOD, 1, 6 * PERIOD)
    ys = [plan.target_at(step * PERIOD)[1] for step in range(6, 12)]
    assert np.allclose(ys, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert plan.target_at(6 * PERIOD)[9] == 0.0


def test_chunks_become_the_targets_that_the_simulator_would_reach() -> None:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (HORIZON, 7)).astype(np.float32)
    targets = chunk_to_targets(actions, START, EMBODIMENT)
    expected = START
    for action, target in zip(actions, targets, strict=True):
        recovered = action_towards(expected, target, EMBODIMENT)
        expected = integrate_action(expected, action, EMBODIMENT)
        assert np.allclose(target, expected)
        assert np.allclose(recovered[:6], action[:6], atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.0])
def test_a_broken_policy_is_an_error(bad: float) -> None:
    actions = np.zeros((HORIZON, 7), dtype=np.float32)
    actions[3, 2] = bad
    with pytest.raises(ActionError, match="policy"):
        chunk_to_targets(actions, START, EMBODIMENT)

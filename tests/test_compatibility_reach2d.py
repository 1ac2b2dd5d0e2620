"""Operators who go different ways in reach2d, in MuJoCo: the task, the styles, and that their conflict is found."""

from __future__ import annotations

import numpy as np
import pytest

from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.operator_style import STYLES, OperatorStyle
from simtoreal.envs import Listener, make_vector_env, rollout
from simtoreal.envs.errors import ConfigError

UP, RIGHT = 2, 1


class _Actions(Listener):
    """The actions of every episode."""

    def __init__(self) -> None:
        self.running, self.episodes = {}, []

    def on_reset(self, slot, episode, seed, observation, info) -> None:
        self.running[slot] = []

    def on_step(self, step) -> None:
        for row, slot in enumerate(step.slots):
            self.running[int(slot)].append(step.action[row].copy())

    def on_episode(self, slot, result) -> None:
        self.episodes.append((result, np.array(self.running.pop(slot))))


@pytest.fixture(scope="module")
def recorded():
    env, found = make_vector_env("reach2d", 10, observe="state"), {}
    for style in ("up_right", "right_up", "straight"):
        listener = _Actions()
        rollout(env, ScriptedExpert(env.task, env.embodiment, style=STYLES[style]), range(10), listeners=[listener])
        found[style] = listener.episodes
    return found


def test_every_way_leads_to_the_goal_in_a_second(recorded):
    for style, episodes in recorded.items():
        assert all(result.success for result, _ in episodes), style
        assert max(result.steps for result, _ in episodes) <= 30


def test_the_ways_part_at_the_start(recorded):
    for _, actions in recorded["up_right"]:
        assert actions[0, UP] > 0.9
        assert abs(actions[0, RIGHT]) < 0.05
    for _, actions in recorded["right_up"]:
        assert actions[0, RIGHT] < -0.9
        assert abs(actions[0, UP]) < 0.05
    for _, actions in recorded["straight"]:
        assert actions[0, UP] > 0.3
        assert actions[0, RIGHT] < -0.3


def test_one_axis_is_done_before_the_next_begins(recorded):
    for _, actions in recorded["up_right"]:
        turn = int(np.argmax(np.abs(actions[:, RIGHT]) > 0.1))
        assert np.abs(actions[turn + 1 :, UP]).max() < 0.3


@pytest.mark.parametrize("route", [("z", "w"), ("z", "z")])
def test_routes_are_axes(route):
    with pytest.raises(ConfigError, match="expected distinct axes"):
        OperatorStyle(route=route)

"""The scripted expert solves every task, follows moving objects and recovers from disturbances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.expert_scene import Scene, nearest
from simtoreal.data_collection.operator_style import STYLES, OperatorStyle
from simtoreal.envs import Listener, list_tasks, load_task, make_vector_env, panda_embodiment, rollout
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.task_file import parse_task


def _success(task: str, episodes: int, style: str = "expert", **options) -> list[bool]:
    env = make_vector_env(task, 20, observe="state")
    expert = ScriptedExpert(env.task, env.embodiment, style=STYLES[style])
    return [result.success for result in rollout(env, expert, range(1000, 1000 + episodes), **options)]


@pytest.mark.parametrize("task", list_tasks())
def test_expert_solves(task):
    successes = _success(task, 40)
    assert sum(successes) >= 38, f"{sum(successes)}/40"


@pytest.mark.parametrize("size", [[0.015, 0.045, 0.02], [0.045, 0.015, 0.02]])
def test_a_box_is_held_across_the_side_that_fits_between_the_fingers(size):
    content = load_task("lift").to_dict()
    content["objects"]["cube"]["size_m"] = size
    env = make_vector_env(parse_task(content), 20, observe="state")
    results = rollout(env, ScriptedExpert(env.task, env.embodiment), range(20))
    assert sum(result.success for result in results) >= 19


def test_a_box_that_fits_both_ways_is_held_the_nearer_way():
    content = load_task("lift").to_dict()
    for size, narrow_only in (([0.02, 0.02, 0.02], False), ([0.015, 0.039, 0.02], False), ([0.015, 0.045, 0.02], True)):
        content["objects"]["cube"]["size_m"] = size
        task = parse_task(content)
        expert = ScriptedExpert(task, panda_embodiment())
        for yaw in np.linspace(-3.1, 3.1, 40):
            for hand in np.linspace(-1.5, 1.5, 7):
                scene = Scene(np.zeros(3), hand, np.zeros(3), 1.0, {"cube": (np.zeros(3), yaw)}, {})
                found = expert._grasp_yaw(scene, task.object("cube"))
                if narrow_only:
                    # The fingers close along the gripper's y axis, which has to be the box's x axis.
                    assert abs(math.sin(found - yaw)) == pytest.approx(1.0)
                    assert abs(found - hand) <= math.pi / 2 + 1e-9
                else:
                    assert found == nearest(yaw, hand, math.pi / 2)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_every_style_solves_pick_place(style):
    assert sum(_success("pick_place", 20, style)) >= 18


def test_the_expert_waits_for_an_arm_that_is_behind():
    env = make_vector_env("reach", 2, observe="state")
    observation, info = env.reset(seed=0)
    proprio = observation["proprio"].copy()
    # The target of the second is 0.1 m ahead of its hand: a gate stops an arm that is left too far behind.
    proprio[:, 9:12] = proprio[:, :3] + np.array([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    expert = ScriptedExpert(env.task, env.embodiment)
    expert.reset(np.arange(2), [0, 1])
    seen = {"proprio": proprio[:, None], "object_state": observation["object_state"][:, None]}
    actions = expert.act(seen, info["instruction"], np.arange(2))
    assert np.abs(actions[0, 0, :3]).max() > 0.5
    assert np.abs(actions[1, 0, :3]).max() < 1e-6


def test_styles_differ_in_what_they_do():
    env = make_vector_env("pick_place", 20, observe="state")
    lengths = {}
    for name in ("hasty", "careful"):
        results = rollout(env, ScriptedExpert(env.task, env.embodiment, style=STYLES[name]), range(20))
        lengths[name] = np.mean([result.steps for result in results])
    assert lengths["careful"] > 1.3 * lengths["hasty"]


class _Disturbance(Listener):
    """Moves the cube away while the gripper descends, and knocks it out of the gripper once when carried."""

    def __init__(self, env) -> None:
        self.env, self.step, self.knocked = env, np.zeros(env.num_envs, int), 0

    def on_reset(self, slot, episode, seed, observation, info) -> None:
        self.step[slot] = 0

    def on_step(self, step) -> None:
        self.step[step.slots] += 1
        where = self.env.objects["cube"]
        qpos = self.env.fields["qpos"]
        for slot in step.slots:
            if self.step[slot] == 6:
                qpos[slot, where.qpos + 1] += 0.05
            carried = qpos[slot, where.qpos + 2] > 0.06
            if carried and self.step[slot] < 40:
                self.step[slot] = 100
                qpos[slot, where.qpos : where.qpos + 3] = [0.48, 0.16, 0.02]
                self.env.fields["qvel"][slot, where.qvel : where.qvel + 6] = 0
                self.knocked += 1


def test_expert_follows_and_recovers():
    env = make_vector_env("pick_place", 10, observe="state")
    disturbance = _Disturbance(env)
    expert = ScriptedExpert(env.task, env.embodiment)
    results = rollout(env, expert, range(20), listeners=[disturbance])
    assert disturbance.knocked >= 10
    assert sum(result.success for result in results) >= 18


def test_wrong_settings_are_reported():
    with pytest.raises(ConfigError, match="'speed' is 0"):
        OperatorStyle(speed=0)
    env = make_vector_env("reach", 1, observe="state")
    expert = ScriptedExpert(env.task, env.embodiment)
    expert.reset(np.array([0]), [0])
    with pytest.raises(ConfigError, match="object_state"):
        expert.act({"proprio": np.zeros((1, 1, 20), np.float32)}, [""], np.array([0]))

"""The MuJoCo backend: exactness, independence of seeds, faults, rendering, randomisation."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium.vector import AutoresetMode

from simtoreal.envs import gym_id, list_tasks, load_task, make_env, make_vector_env, panda_embodiment
from simtoreal.envs.embodiment import SIMULATED_ARMS, TARGET_NAMES, ActionSpec, Embodiment
from simtoreal.envs.errors import ActionError, ConfigError, EmbodimentMismatchError, TaskError
from simtoreal.envs.randomization import MAX_LATENCY_STEPS, START_HEIGHT_M, Randomization
from simtoreal.envs.scene_layout import DRAWER_SMALLEST_M, DRAWER_TRAVEL_M
from simtoreal.envs.task import SUCCESS_HOLD_STEPS
from simtoreal.envs.task_file import RESERVED_NAMES, parse_task, parse_task_text


def _actions(steps: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, count, 7)).astype(np.float32)


def _same(a: dict, b: dict) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in a)


def test_restored_state_replays_bit_identically():
    env = make_vector_env("stack", 3, image_size=32)
    env.reset(seed=0)
    actions = _actions(30, 3)
    for action in actions[:10]:
        env.step(action)
    state = env.get_state()
    first = [env.step(action) for action in actions[10:]]
    env.set_state(state)
    second = [env.step(action) for action in actions[10:]]
    for one, two in zip(first, second, strict=True):
        assert _same(one[0], two[0])
        assert np.array_equal(one[4]["target"], two[4]["target"])


def test_state_carries_over_to_another_environment():
    source, target = make_env("pick_place", observe="state"), make_env("pick_place", observe="state")
    source.reset(seed=1)
    target.reset(seed=2)
    actions = _actions(20, 1)[:, 0]
    for action in actions[:8]:
        source.step(action)
    target.set_state(source.get_state())
    for action in actions[8:]:
        assert _same(source.step(action)[0], target.step(action)[0])
    with pytest.raises(ConfigError, match="needs"):
        target.set_state(np.zeros(5))


def test_seed_defines_the_episode_whatever_the_slot():
    wide, narrow = make_vector_env("pick_place", 4, image_size=32), make_vector_env("pick_place", 1, image_size=32)
    observation, _ = wide.reset(seed=[10, 11, 12, 13])
    alone, _ = narrow.reset(seed=[12])
    actions = _actions(5, 4)
    for action in actions:
        for key in alone:
            # A rasteriser may round a pixel differently in another tile of the framebuffer; physics may not.
            tolerance = 2 if key.endswith("_image") else 0
            assert np.abs(observation[key][2].astype(float) - alone[key][0]).max() <= tolerance, key
        observation = wide.step(action)[0]
        alone = narrow.step(action[2:3])[0]


def test_partial_reset_leaves_the_others_alone():
    env = make_vector_env("push", 3, image_size=32)
    env.reset(seed=5)
    for action in _actions(4, 3):
        before = env.step(action)[0]
    after, info = env.reset(seed=[None, 99, None], options={"reset_mask": np.array([False, True, False])})
    for key in before:
        assert np.array_equal(before[key][[0, 2]], after[key][[0, 2]]), key
    assert not np.array_equal(before["object_state"][1], after["object_state"][1])
    assert info["init_id"].tolist() == [5, 99, 7]


def test_images_that_nobody_wants_stay_as_they_were():
    env = gym.make("simtoreal/Reach-v0", image_size=32)
    first = env.reset(seed=0)[0]
    env.unwrapped.images_wanted = False
    action = np.full(7, 0.5, np.float32)
    after = env.step(action)[0]
    assert np.array_equal(after["front_image"], first["front_image"])
    assert not np.array_equal(after["proprio"], first["proprio"])
    with pytest.raises(ActionError, match=r"shape \(6,\); expected \(7,\)"):
        env.unwrapped.step(action[:6])
    env.unwrapped.images_wanted = True
    assert not np.array_equal(env.step(action)[0]["front_image"], first["front_image"])


def test_ended_simulations_wait_for_their_reset():
    env = make_vector_env("reach", 2, observe="state")
    env.reset(seed=0)
    state = env.get_state()
    env._steps[0] = env.task.horizon - 1
    _, _, terminated, truncated, _ = env.step(np.zeros((2, 7), np.float32))
    assert truncated.tolist() == [True, False]
    assert not terminated.any()
    frozen = env.get_state()[0].copy()
    env.step(_actions(1, 2)[0])
    assert np.array_equal(env.get_state()[0], frozen)
    assert not np.array_equal(env.get_state()[1], state[1])


def test_next_step_autoreset_begins_a_new_episode():
    env = gym.make_vec("simtoreal/Reach-v0", num_envs=2, observe="state")
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    env.reset(seed=0)
    env.unwrapped._steps[:] = [env.unwrapped.task.horizon - 1, 0]
    assert env.step(np.zeros((2, 7), np.float32))[3].tolist() == [True, False]
    _, reward, terminated, truncated, _ = env.step(np.zeros((2, 7), np.float32))
    assert reward.tolist() == [0, 0]
    assert not (terminated | truncated).any()
    assert env.unwrapped._steps.tolist() == [0, 2]


def test_success_must_be_held():
    env = make_env("reach", observe="state")
    observation, _ = env.reset(seed=3)
    flags = []
    for _ in range(40):
        goal, target = observation["object_state"][:3], observation["proprio"][9:12]
        action = np.zeros(7, np.float32)
        action[:3] = np.clip((goal - target) / 0.02, -1, 1)
        observation, reward, terminated, _, info = env.step(action)
        inside = np.linalg.norm(goal - observation["proprio"][:3]) < 0.015
        flags.append(inside)
        if terminated:
            break
    assert terminated
    assert reward == 1.0
    assert info["success"] is True
    assert flags[-SUCCESS_HOLD_STEPS:] == [True] * SUCCESS_HOLD_STEPS
    assert not flags[-SUCCESS_HOLD_STEPS - 1]
    _, reward, terminated, _, info = env.step(action)
    assert (reward, terminated, info["success"]) == (0.0, True, True), "an episode that has ended is paid once"


@pytest.mark.parametrize("fault", ["nan", "huge"])
def test_divergence_is_never_silent(fault):
    env = make_vector_env("pick_place", 2, observe="state")
    env.reset(seed=0)
    env.fields["qvel"][0, 10] = np.nan if fault == "nan" else 1e12
    _, reward, terminated, truncated, info = env.step(np.zeros((2, 7), np.float32))
    assert info["sim_fault"].tolist() == ["simulation diverged", ""]
    assert truncated.tolist() == [True, False]
    assert not terminated.any()
    assert reward.tolist() == [0, 0]
    observation, info = env.reset(seed=[4, None], options={"reset_mask": np.array([True, False])})
    assert info["sim_fault"].tolist() == ["", ""]
    assert np.isfinite(observation["object_state"]).all()


def test_a_simulation_that_diverges_in_the_step_of_success_has_none(monkeypatch):
    env = make_vector_env("pick_place", 2, observe="state")
    env.reset(seed=0)
    _reach_goal(env)
    env.batch.forward()
    env._hold[:] = SUCCESS_HOLD_STEPS - 1
    physics = env._step_physics

    def diverge(slots: np.ndarray | None) -> None:
        physics(slots)
        env._faults[0] = "simulation diverged"

    monkeypatch.setattr(env, "_step_physics", diverge)
    _, reward, terminated, truncated, info = env.step(np.zeros((2, 7), np.float32))
    assert info["success"].tolist() == terminated.tolist() == [False, True]
    assert (truncated.tolist(), reward.tolist()) == ([True, False], [0, 1])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(6, np.float32), "shape"),
        (np.full(7, np.nan, np.float32), "not finite"),
        (np.full(7, 1.5, np.float32), r"expected a value in \[-1, 1\]"),
        (np.array(["a"] * 7), "dtype"),
    ],
)
def test_bad_actions_are_errors(action, message):
    env = make_env("reach", observe="state")
    env.reset(seed=0)
    with pytest.raises(ActionError, match=message):
        env.step(action)


def test_unknown_names_give_the_closest():
    with pytest.raises(TaskError, match="Did you mean 'stack'"):
        make_env("stak")
    with pytest.raises(ConfigError, match="Did you mean 'front'"):
        make_env("reach", cameras=("frnt",))
    with pytest.raises(ConfigError, match="Did you mean 'standard'"):
        make_env("reach", randomization="standart")
    env = make_env("reach", render_mode="rgb_array")
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="Did you mean 'overview'"):
        env.render("overvew")


@pytest.mark.parametrize("task", list_tasks())
def test_goal_is_false_at_every_reset(task):
    for randomization in (None, "training"):
        env = make_vector_env(task, 64, observe="state", randomization=randomization)
        for seed in (0, 64):
            env.reset(seed=seed)
            assert not env.task.goal_predicate(env._scene()).any()


def test_a_start_inside_the_goal_is_drawn_again_from_the_same_seed():
    content = load_task("reach").to_dict()
    content["initial"]["goal"] = {"x_m": [0.3, 0.7], "y_m": [-0.2, 0.2], "z_m": [0.1, 0.5]}
    task = parse_task({**content, "goal": "at(tcp, goal, 0.15)"})
    easy = parse_task({**content, "goal": "at(tcp, goal, 0.001)"})
    env, unfiltered = make_vector_env(task, 64, observe="state"), make_vector_env(easy, 64, observe="state")
    first, info = env.reset(seed=0)
    raw = unfiltered.reset(seed=0)[0]
    inside = np.linalg.norm(raw["object_state"][:, :3] - raw["proprio"][:, :3], axis=-1) < 0.15
    assert 3 < inside.sum() < 60
    assert not env.task.goal_predicate(env._scene()).any()
    same = (first["object_state"] == raw["object_state"]).all(axis=-1)
    assert np.array_equal(same, ~inside), "seeds whose first draw was good keep it"
    assert info["init_id"].tolist() == list(range(64))
    slot = int(np.flatnonzero(inside)[0])
    alone = make_vector_env(task, 1, observe="state").reset(seed=[slot])[0]
    assert _same({key: value[slot : slot + 1] for key, value in first.items()}, alone)


def test_a_goal_that_always_holds_is_an_error():
    content = load_task("reach").to_dict()
    env = make_vector_env(parse_task({**content, "goal": "at(tcp, goal, 5)"}, "mine.yaml"), 2, observe="state")
    with pytest.raises(TaskError, match=r"mine\.yaml: key 'goal' \(at\(tcp, goal, 5\)\) holds before anything is done"):
        env.reset(seed=0)


def _free(env, name: str, position: tuple[float, ...]) -> None:
    """Put a free object at ``position``, upright and at rest, in every simulation."""
    where = env.objects[name]
    env.fields["qpos"][:, where.qpos : where.qpos + 7] = [*position, 1, 0, 0, 0]
    env.fields["qvel"][:, where.qvel : where.qvel + 6] = 0


def _fixed(env, name: str, position: tuple[float, ...]) -> None:
    env.fields["mocap_pos"][:, env.objects[name].mocap] = position
    env.fields["mocap_quat"][:, env.objects[name].mocap] = [1, 0, 0, 0]


def _reach_goal(env) -> None:
    """Move the objects to where the task wants them, away from the arm."""
    spot, half = (0.5, 0.12), {item.name: item.half_height_m for item in env.task.objects}
    if env.task.name == "pick_place":
        _fixed(env, "plate", (*spot, 0))
        _free(env, "cube", (*spot, env.task.object("plate").top_m + half["cube"]))
    elif env.task.name == "stack":
        _free(env, "blue_cube", (*spot, half["blue_cube"]))
        _free(env, "red_cube", (*spot, 2 * half["blue_cube"] + half["red_cube"]))
    elif env.task.name == "insert":
        _fixed(env, "socket", (*spot, 0))
        _free(env, "peg", (*spot, half["peg"]))
    elif env.task.name == "push":
        _fixed(env, "region", (*spot, 0))
        _free(env, "block", (*spot, half["block"]))
    else:
        opening = DRAWER_TRAVEL_M if env.task.name == "drawer_open" else 0.0
        env.fields["qpos"][:, env.objects["drawer"].joint_qpos] = opening


@pytest.mark.parametrize("task", ["pick_place", "stack", "insert", "push", "drawer_open", "drawer_close"])
def test_goal_stays_true_once_the_scene_is_there(task):
    env = make_vector_env(task, 2, observe="state")
    env.reset(seed=0)
    _reach_goal(env)
    env.batch.forward()
    hold = np.zeros((2, 7), np.float32)
    hold[:, 6] = 1.0
    held = []
    for _ in range(20):
        # Without its count of held steps the episode would end and the simulation stop.
        env._hold[:] = 0
        _, _, terminated, truncated, _ = env.step(hold)
        assert not (terminated | truncated).any()
        held.append(env.task.goal_predicate(env._scene()))
    assert np.all(held)


@pytest.mark.parametrize(("task", "item", "target"), [("push", "block", "region"), ("align", "frame", "mark")])
def test_what_is_held_above_its_target_is_not_there(task, item, target):
    env = make_vector_env(task, 1, observe="state")
    env.reset(seed=0)
    _fixed(env, target, (0.5, 0.12, 0))
    for height, there in ((env.task.object(item).half_height_m, True), (0.2, False)):
        _free(env, item, (0.5, 0.12, height))
        env.batch.forward()
        assert env.task.goal_predicate(env._scene()).tolist() == [there]


def test_only_displacements_drive_the_simulation():
    panda = panda_embodiment()
    absolute = ActionSpec(mode="ee_abs", names=TARGET_NAMES, units=("",) * 10, limits=(1.0,) * 10)
    with pytest.raises(ConfigError, match="action mode 'ee_abs'; the simulation takes 'ee_delta'"):
        make_vector_env("reach", 1, embodiment=dataclasses.replace(panda, action=absolute))
    with pytest.raises(ValueError, match="'joint_abs' is not one of"):
        dataclasses.replace(absolute, mode="joint_abs")


def test_the_smallest_drawer_can_be_simulated():
    content = load_task("drawer_open").to_dict()
    content["objects"]["drawer"]["size_m"] = list(DRAWER_SMALLEST_M)
    env = make_env(parse_task_text(yaml.safe_dump(content), "mine.yaml"), observe="state")
    env.reset(seed=0)
    assert env.step(np.zeros(7, np.float32))[4]["sim_fault"] == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ur5e"}, "robot 'ur5e' cannot be simulated. Valid: panda"),
        ({"home_joint_positions_rad": (0.0,) * 6}, "has 6 values; expected 7"),
        ({"mount": "flange"}, "camera 'front' of embodiment 'panda' is mounted on 'flange', which cannot"),
    ],
)
def test_robots_that_cannot_be_simulated_are_refused(changes, message):
    panda = panda_embodiment()
    if "mount" in changes:
        changes = {"cameras": (dataclasses.replace(panda.cameras[0], **changes),)}
    other = dataclasses.replace(panda, **changes)
    assert Embodiment.from_dict(other.to_dict()) == other, "a robot that is not simulated may be so"
    for make in (lambda: make_env("reach", embodiment=other), lambda: make_vector_env("reach", 1, embodiment=other)):
        with pytest.raises(ConfigError, match=message):
            make()


@pytest.mark.parametrize("rate", [0.0, -20.0, float("nan"), float("inf")])
def test_control_rates_are_positive_numbers(rate):
    with pytest.raises(ConfigError, match=f"control_hz of embodiment 'panda' is {rate}; expected a positive number"):
        dataclasses.replace(panda_embodiment(), control_hz=rate)
    with pytest.raises(EmbodimentMismatchError, match="control_hz"):
        Embodiment.from_dict({**panda_embodiment().to_dict(), "control_hz": rate})


@pytest.mark.parametrize(
    "changes",
    [
        {"workspace_low_m": (0.72, -0.32, 0.012), "workspace_high_m": (0.28, 0.32, 0.45)},
        {"workspace_high_m": (0.72, 0.32, float("nan"))},
        {"workspace_low_m": (-float("inf"), -0.32, 0.012)},
    ],
)
def test_workspaces_are_boxes(changes):
    with pytest.raises(ConfigError, match=r"workspace of embodiment 'panda' is .*; expected finite metres, low"):
        dataclasses.replace(panda_embodiment(), **changes)
    with pytest.raises(EmbodimentMismatchError, match="workspace"):
        Embodiment.from_dict({**panda_embodiment().to_dict(), **changes})


def test_nothing_to_simulate_and_nothing_to_draw_are_refused():
    with pytest.raises(ConfigError, match="num_envs is 0; expected at least 1"):
        gym.make_vec(gym_id("reach"), num_envs=0)
    with pytest.raises(ConfigError, match="embodiment 'panda' has no cameras; expected at least one, or 'state'"):
        make_env("reach", cameras=())
    make_env("reach", cameras=(), observe="state").reset(seed=0)
    with pytest.raises(ConfigError, match="cameras are front, front; name each once"):
        make_env("reach", cameras=("front", "front"))
    with pytest.raises(ConfigError, match="threads is -1; expected at least 0"):
        make_vector_env("reach", 2, threads=-1)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, "seed is -1; expected an integer of at least 0"), ([0, -3], "seed is -3; expected an integer"),
        (1.5, "seed is 1.5; expected an integer, or one per episode"), ("12", "seed is '12'; expected an integer, or"),
        ([0, 1.5], "seed is 1.5; expected"), ([0, True], "seed is True; expected"), ([0, 1, 2], "got 3 seeds for 2"),
    ],
)  # fmt: skip
def test_invalid_seeds_are_refused(seed, message):
    env = make_vector_env("reach", 2, observe="state", cameras=())
    with pytest.raises(ConfigError, match=message):
        env.reset(seed=seed)
    _, info = env.reset(seed=np.array([4, 2]))
    assert info["init_id"].tolist() == [4, 2]


def test_pictures_are_taken_with_the_cameras_of_the_embodiment():
    panda = panda_embodiment(cameras=("front",))
    side = dataclasses.replace(panda.cameras[0], name="side", position_m=(0.9, 0.0, 0.6))
    env = make_env(
        "lift", embodiment=dataclasses.replace(panda, cameras=(side, *panda.cameras)), observe="state",
        render_mode="rgb_array",
    )  # fmt: skip
    env.reset(seed=0)
    assert np.abs(env.render("side").astype(int) - env.render("front")).mean() > 5
    with pytest.raises(ConfigError, match=r"unknown camera 'wrist'. .*Valid: front, overview, side"):
        env.render("wrist")
    env.close()


def test_every_name_of_the_robot_is_reserved():
    model = make_vector_env("reach", 1, observe="state").model
    names = {model.body(index).name for index in range(model.nbody)}
    joints, mounts = SIMULATED_ARMS["panda"]
    assert set(mounts) == names - {"goal"}
    assert len(panda_embodiment().home_joint_positions_rad) == joints
    names |= {model.site(index).name for index in range(model.nsite)}
    names |= {model.geom(index).name for index in range(model.ngeom)}
    assert names - {"goal", ""} <= RESERVED_NAMES


def test_images_show_the_scene():
    env = make_vector_env("pick_place", 2, image_size=64)
    observation, _ = env.reset(seed=0)
    for image in observation["front_image"].astype(int):
        red = (image[..., 0] > 120) & (image[..., 1] < 70)
        green = (image[..., 1] > 90) & (image[..., 0] < 90)
        assert red.sum() >= 8
        assert green.sum() >= 30


def test_a_program_that_never_closes_an_environment_ends_silently():
    """Whatever was imported before: torch prepares its own end before mujoco prepares that of EGL."""
    program = (
        "import torch, simtoreal.envs as envs; env = envs.make_vector_env('reach', 1, image_size=16); env.reset(seed=0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


def test_image_of_a_moved_cube_changes_where_it_was():
    env = make_env("lift")
    first, _ = env.reset(seed=0)
    state = env.get_state()
    env.vector.fields["qpos"][0, env.vector.objects["cube"].qpos + 1] += 0.08
    env.vector.batch.forward()
    moved = env.step(np.zeros(7, np.float32))[0]
    difference = np.abs(first["front_image"].astype(int) - moved["front_image"]).sum(-1)
    changed = difference > 60
    assert 8 < changed.sum() < 200
    env.set_state(state)


def test_randomization_varies_worlds_and_seeds_repeat_them():
    env = make_vector_env("pick_place", 2, randomization="standard")
    first, _ = env.reset(seed=[0, 1])
    masses = env.batch.expand("body_mass")[:, env.objects["cube"].body].copy()
    nominal = env.model.body_mass[env.objects["cube"].body]
    assert ((masses >= 0.7 * nominal) & (masses <= 1.3 * nominal)).all()
    assert masses[0] != masses[1]
    assert set(env._latency) <= {1, 2}
    gains = env.batch.expand("actuator_gainprm")[:, 0, 0]
    assert np.allclose(gains, 0.85 * env.model.actuator_gainprm[0, 0])
    env.reset(seed=[5, 6])
    again, _ = env.reset(seed=[0, 1])
    assert _same(first, again)
    plain, _ = make_vector_env("pick_place", 2).reset(seed=[0, 1])
    assert not np.array_equal(plain["front_image"], first["front_image"])
    assert np.allclose(plain["object_state"], first["object_state"])


def test_friction_varies_in_the_contacts():
    def slide_m(scale: float) -> float:
        env = make_vector_env("push", 1, observe="state", randomization=Randomization(friction_scale=(scale, scale)))
        env.reset(seed=[3])
        still, block = np.zeros((1, 7), np.float32), env.objects["block"]
        for _ in range(5):
            env.step(still)
        start = env.fields["qpos"][0, block.qpos]
        env.fields["qvel"][0, block.qvel] = 0.6
        for _ in range(20):
            env.step(still)
        return float(env.fields["qpos"][0, block.qpos] - start)

    distances = [slide_m(scale) for scale in (1.2, 1.0, 0.7, 0.5)]
    assert np.all(np.diff(distances) > 0.001)
    # Braking by friction alone: distance and friction are inversely proportional.
    assert distances[3] / distances[1] == pytest.approx(2.0, rel=0.15)


def test_a_control_period_is_a_whole_number_of_time_steps():
    for hz in (10.0, 20.0, 30.0, 60.0, 1000.0):
        env = make_vector_env(
            "reach", 1, observe="state", embodiment=dataclasses.replace(panda_embodiment(), control_hz=hz)
        )
        env.reset(seed=[0])
        for _ in range(7):
            env.step(np.zeros((1, 7), np.float32))
        assert env.batch.bind("time")[0] == pytest.approx(7 / hz)
        assert env.model.opt.timestep <= 0.005


@pytest.mark.parametrize(("seed", "other", "told"), [(5, 6, 5), ([5, 6], [5, 7], -1)])
def test_seeds_also_fix_the_episodes_that_follow(seed, other, told):
    def followers(seed: int | list[int], ask: bool = False) -> list[int]:
        env = make_vector_env("reach", 2, observe="state", autoreset_mode=AutoresetMode.NEXT_STEP)
        env.reset(seed=seed)
        assert not ask or env.np_random_seed == told
        env._ended[:] = True
        return env.step(np.zeros((2, 7), np.float32))[4]["init_id"].tolist()

    assert followers(seed) == followers(seed) == followers(seed, ask=True) != followers(other)


def test_an_episode_that_begins_in_the_last_state_of_another_runs():
    env = make_vector_env("reach", 1, observe="state")
    _, info = env.reset(seed=[0])
    assert not info["task_failed"].any()
    env._ended[:] = True
    env.reset(seed=[1], options={"init": env.get_state()})
    before = env.step(np.zeros((1, 7), np.float32))[0]["proprio"]
    after = env.step(np.array([[0, 0, 1, 0, 0, 0, 1]], np.float32))[0]["proprio"]
    assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_steps": (5, 8)}, r"'latency_steps' is \(5, 8\); expected .* two whole numbers from 0 to 4"),
        ({"latency_steps": (-1, -1)}, "from 0 to 4"),
        ({"latency_steps": (0.5, 1.5)}, "two whole numbers"),
        ({"mass_scale": (-1.0, -1.0)}, r"'mass_scale' is \(-1.0, -1.0\); expected .* from 0.01 to 100"),
        ({"mass_scale": (float("nan"), 1.0)}, "'mass_scale' is .*nan"),
        ({"mass_scale": 2.0}, r"'mass_scale' is 2.0; expected \(low, high\)"),
        ({"mass_scale": (1.2, 0.8)}, "low <= high"),
        ({"gain_scale": (-1.0, 1.0)}, "'gain_scale'"),
        ({"camera_fov_deg": (200.0, 200.0)}, "'camera_fov_deg' .* from -30 to 30"),
        ({"image_noise": -1.0}, "'image_noise' is -1.0; expected a number from 0 to 255"),
        ({"color_jitter": float("nan")}, "'color_jitter' is nan"),
        ({"joint_noise_rad": (0.0, 0.1)}, "'joint_noise_rad' .* expected a number"),
        ({"start_anywhere": 1.5}, "'start_anywhere'"),
    ],
)
def test_worlds_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"randomization {message}" if message.startswith("'") else message):
        Randomization(**changes)


def test_the_longest_latency_that_is_accepted_can_be_simulated():
    longest = Randomization(latency_steps=(MAX_LATENCY_STEPS, MAX_LATENCY_STEPS))
    env = make_vector_env("reach", 1, observe="state", randomization=longest)
    env.reset(seed=0)
    for action in _actions(MAX_LATENCY_STEPS + 2, 1):
        env.step(action)


def test_latency_delays_the_effect_of_a_command():
    def response(latency: int) -> int:
        env = make_vector_env("reach", 1, observe="state", randomization="standard")
        observation, _ = env.reset(seed=[0])
        env._latency[:] = latency
        start = observation["proprio"][0, 2]
        action = np.array([[0, 0, 1, 0, 0, 0, 1]], np.float32)
        for step in range(10):
            observation = env.step(action)[0]
            if observation["proprio"][0, 2] > start + 0.003:
                return step
        raise AssertionError("the arm did not move")

    assert [response(latency) - response(0) for latency in (1, 2)] == [1, 2]


def test_arms_may_start_anywhere_above_the_table():
    env = make_vector_env("insert", 16, observe="state", randomization=Randomization(start_anywhere=1.0))
    observation, info = env.reset(seed=0)
    tcp, home = observation["proprio"][:, :3], make_vector_env("insert", 1, observe="state").reset(seed=[0])[0]
    assert np.abs(tcp - info["target"][:, :3]).max() < 0.01, "the arm is at rest at its target"
    assert tcp[:, 2].min() > 0.09, "fingers stay above the peg"
    assert np.ptp(tcp, axis=0).min() > 0.1
    assert np.abs(tcp - home["proprio"][0, :3]).max(axis=1).min() > 0.005
    opening = observation["proprio"][:, 12]
    assert 2 <= (opening < 0.1).sum() <= 14, "some grippers are closed"
    assert np.array_equal(info["target"][:, 9] > 0.5, opening > 0.5)
    alone = make_vector_env("insert", 1, observe="state", randomization=Randomization(start_anywhere=1.0))
    assert _same({key: value[5:6] for key, value in observation.items()}, alone.reset(seed=[5])[0])


@pytest.mark.parametrize("rate", [10.0, 20.0, 100.0])
def test_arms_that_start_anywhere_are_at_rest_at_any_control_rate(rate):
    embodiment, start = dataclasses.replace(panda_embodiment(), control_hz=rate), Randomization(start_anywhere=1.0)
    env = make_vector_env("insert", 16, observe="state", embodiment=embodiment, randomization=start)
    observation, info = env.reset(seed=0)
    assert np.abs(observation["proprio"][:, :3] - info["target"][:, :3]).max() < 0.01
    assert np.abs(env.fields["qvel"][:, :7]).max() < 0.1


def test_pictures_are_taken_at_the_control_rate():
    slow = dataclasses.replace(panda_embodiment(), control_hz=10.0)
    for env in (make_env("reach", embodiment=slow), make_vector_env("reach", 1, embodiment=slow)):
        assert env.metadata["render_fps"] == 10
    assert gym.make("simtoreal/Reach-v0", observe="state").metadata["render_fps"] == 20


def test_starts_anywhere_are_inside_the_workspace():
    def task(half_height: float):
        content = load_task("drawer_open").to_dict()
        content["objects"]["drawer"]["size_m"] = [0.05, 0.09, half_height]
        content["initial"]["drawer"]["y_m"] = [0.0, 0.0]
        return parse_task(content, "shelf.yaml")

    env = make_vector_env(task(0.15), 32, observe="state", randomization=Randomization(start_anywhere=1.0))
    before = env.reset(seed=0)[1]["target"]
    assert before[:, 2].max() <= env.embodiment.workspace_high_m[2] + 1e-9
    assert before[:, 2].min() >= 0.3 + START_HEIGHT_M[0] - 0.01
    after = env.step(np.zeros((32, 7), np.float32))[4]["target"]
    assert np.allclose(after[:, :3], before[:, :3], rtol=0, atol=1e-9), "an action of zero moves no target"
    message = r"shelf\.yaml: 'drawer' is 0\.43 m high.* make it at most 0\.42 m high, or use a randomization"
    with pytest.raises(TaskError, match=message):
        make_vector_env(task(0.215), 1, observe="state", randomization="training")
    make_vector_env(task(0.215), 1, observe="state", randomization="standard")


def test_batches_have_no_pictures_of_their_own():
    with pytest.raises(ConfigError, match="single environments"):
        gym.make_vec(gym_id("reach"), num_envs=2, render_mode="rgb_array")


@pytest.mark.parametrize("task", list_tasks())
def test_gym_make_and_picture(task):
    env = gym.make(gym_id(task), render_mode="rgb_array", observe="state")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (480, 640, 3)
    assert picture.std() > 20
    env.close()

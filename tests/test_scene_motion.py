"""Scene motion (MOVE): what moves when, how far, and that demonstrations under it are sound."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from simtoreal.data_collection.collect import CollectionPlan, collect
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.operator_style import OperatorStyle
from simtoreal.data_collection.windows import WindowSampler
from simtoreal.envs import load_task, make_vector_env, rotation
from simtoreal.envs.camera_motion import displace_camera
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.rollout import Listener, Step, rollout
from simtoreal.envs.scene_motion import MARGIN_M, SCENE_MOTIONS, SceneMotion, footprint, load_motion
from simtoreal.envs.tabletop_vector import TabletopVectorEnv
from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import parse_task
from simtoreal.policies.config import BCConfig
from simtoreal.policies.training_data import open_training_data
from simtoreal.robot.twin_world import TICK_S, TwinWorld

FAST = dataclasses.replace(SCENE_MOTIONS["move"], object_speed_m_s=0.5, target_speed_m_s=0.5, object_turn_deg_s=90.0)
DRIVEN = np.tile(np.array([0, 0, 0.1, 0, 0, 0, 1], np.float32), (8, 1))
IDLE = np.zeros((8, 7), np.float32)


class _Watch(Listener):
    """Collects the log of the motion, contacts and object states of slot 0 ... N by episode seed."""

    def __init__(self) -> None:
        self.rows: list[dict[str, np.ndarray]] = []

    def on_step(self, step: Step) -> None:
        entries = {name: value.copy() for name, value in step.info["scene_motion"].items()}
        touched = step.info["contacts"]["cube"]
        self.rows.append(
            {
                **entries,
                "seed": step.info["init_id"],
                "touched": touched,
                "before": step.observation["object_state"],
                "after": step.next_observation["object_state"],
            }
        )

    def of(self, seed: int) -> dict[str, np.ndarray]:
        """Everything of one episode in order, ``(T, ...)`` by name."""
        return {
            name: np.stack([row[name][list(row["seed"]).index(seed)] for row in self.rows if seed in row["seed"]])
            for name in self.rows[0]
        }


@pytest.fixture(scope="module")
def demonstrated() -> tuple[_Watch, list]:
    env = make_vector_env("pick_place", 20, observe="state", motion=FAST)
    watch = _Watch()
    results = rollout(env, ScriptedExpert(env.task, env.embodiment), range(40), listeners=[watch])
    return watch, results


def test_expert_demonstrates_in_a_moving_scene(demonstrated: tuple[_Watch, list]) -> None:
    watch, results = demonstrated
    assert sum(result.success for result in results) >= 38
    speeds = [np.abs(watch.of(seed)["cube_vx_m_s"]).max() for seed in range(40)]
    assert np.median(speeds) > 0.02


def test_one_speed_factor_per_episode_from_the_beta_distribution(demonstrated: tuple[_Watch, list]) -> None:
    watch, _ = demonstrated
    for seed in range(40):
        assert len(set(watch.of(seed)["speed_factor_object"])) == 1
    env = make_vector_env("pick_place", 400, observe="state", motion="move")
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.zeros((400, 7), np.float32))
    factors = info["scene_motion"]["speed_factor_object"]
    # Beta(2, 5): mean 0.286, standard deviation 0.160; the mean of 400 has a standard error of 0.008.
    assert abs(factors.mean() - 2 / 7) < 0.03
    assert abs(factors.std() - 0.16) < 0.02


def test_speed_stays_below_its_cap_and_inside_the_box(demonstrated: tuple[_Watch, list]) -> None:
    watch, _ = demonstrated
    spec = load_task("pick_place").initial["cube"]
    for seed in range(40):
        rows = watch.of(seed)
        bound = rows["speed_factor_object"] * FAST.object_speed_m_s + 1e-9
        for axis in "xy":
            assert (np.abs(rows[f"cube_v{axis}_m_s"]) <= bound).all()
        moving = np.hypot(rows["cube_vx_m_s"], rows["cube_vy_m_s"]) > 0
        inside = rows["after"][moving, 0:2]
        assert (inside >= [spec.x_m[0] - 2e-3, spec.y_m[0] - 2e-3]).all()
        assert (inside <= [spec.x_m[1] + 2e-3, spec.y_m[1] + 2e-3]).all()


def test_only_the_object_moves_before_the_grasp_and_only_the_target_after(demonstrated: tuple[_Watch, list]) -> None:
    watch, _ = demonstrated
    moved_after = 0
    for seed in range(40):
        rows = watch.of(seed)
        first = int(np.argmax(rows["touched"]))
        assert not np.any(rows["plate_vx_m_s"][:first])
        # The log of a step belongs to the motion before its contact is seen.
        assert not np.any(rows["cube_vx_m_s"][first + 1 :])
        moved_after += bool(np.any(rows["plate_vx_m_s"][first:]))
    assert moved_after > 30


def test_what_was_knocked_out_of_its_box_does_not_jump_back() -> None:
    env = make_vector_env("pick_place", 8, observe="state", motion=FAST)
    env.reset(seed=0)
    wall = load_task("pick_place").initial["cube"].y_m[1]
    env.fields["qpos"][:, env.objects["cube"].qpos + 1] = wall + 0.1
    positions = [np.full(8, wall + 0.1)]
    for _ in range(40):
        observation, *_, info = env.step(DRIVEN)
        positions.append(observation["object_state"][:, 1])
        caps = info["scene_motion"]["speed_factor_object"] * FAST.object_speed_m_s
        assert (np.abs(info["scene_motion"]["cube_vy_m_s"]) <= caps + 1e-9).all()
    steps, outside = np.diff(positions, axis=0), np.array(positions[:-1]) > wall
    assert (np.abs(steps) <= caps * 0.05 + 2e-3).all()
    assert steps[outside].max() < 2e-3, "none goes further out"
    assert (positions[-1] < wall + 0.09).sum() > 5, "they come back"


def test_motion_gives_no_impulse() -> None:
    """Kinematic motion ends at the contact margin: what is set down has no velocity, and nothing is kicked."""
    env = make_vector_env("pick_place", 20, observe="state", motion=FAST)
    expert = ScriptedExpert(env.task, env.embodiment)

    class Speed(Listener):
        worst = 0.0

        def on_step(self, step: Step) -> None:
            speed = np.linalg.norm(env.fields["qvel"][step.slots][:, 9:12], axis=-1)
            free = ~step.info["contacts"]["cube"]
            self.worst = max(self.worst, float(speed[free].max(initial=0.0)))

    listener = Speed()
    rollout(env, expert, range(100, 140), listeners=[listener])
    # A cube that falls out of the hand onto the plate reaches 0.4 m/s; an overlap pushed apart would give metres/s.
    assert listener.worst < 1.0


def test_seed_means_the_same_placement_with_and_without_motion() -> None:
    still, moving = (make_vector_env("pick_place", 8, observe="state", motion=motion) for motion in (None, FAST))
    a, b = still.reset(seed=50)[0], moving.reset(seed=50)[0]
    assert np.array_equal(a["object_state"], b["object_state"])
    assert np.array_equal(still.step(IDLE)[0]["object_state"][:, 7:], moving.step(IDLE)[0]["object_state"][:, 7:])


def test_motion_depends_on_the_seed_only() -> None:
    wide, narrow = (make_vector_env("pick_place", count, observe="state", motion="move_views") for count in (8, 1))
    wide.reset(seed=50)
    narrow.reset(seed=[53])
    for _ in range(10):
        one, two = wide.step(DRIVEN), narrow.step(DRIVEN[:1])
        assert np.array_equal(one[0]["object_state"][3], two[0]["object_state"][0])
        for name, values in one[4]["scene_motion"].items():
            if not name.startswith("front"):
                assert values[3] == two[4]["scene_motion"][name][0]


def test_decorrelated_channels_have_factors_of_their_own() -> None:
    env = make_vector_env("pick_place", 4, observe="state", motion=dataclasses.replace(FAST, correlated=False))
    env.reset(seed=0)
    assert len(np.unique(env._mover.factors)) == 12
    assert np.allclose(np.linalg.norm(env._mover.directions, axis=-1), 1.0)


def test_stops_within_the_margin_of_the_gripper() -> None:
    env = make_vector_env("lift", 8, observe="state", motion=dataclasses.replace(FAST, object_moves_s=60.0))
    expert = ScriptedExpert(env.task, env.embodiment)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    class Gap(Listener):
        def on_step(self, step: Step) -> None:
            apart = step.observation["proprio"][:, :3] - step.observation["object_state"][:, :3]
            gap = np.maximum(np.linalg.norm(apart[:, :2], axis=1) - 0.02, apart[:, 2] - 0.02)
            speed = np.hypot(*(step.info["scene_motion"][f"cube_v{axis}_m_s"] for axis in "xy"))
            rows.append((gap, speed, step.info["contacts"]["cube"]))

    rollout(env, expert, range(30), listeners=[Gap()])
    gaps, speeds, touched = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    assert (speeds[gaps < MARGIN_M - 1e-6] == 0).all()
    assert (speeds[(gaps > MARGIN_M + 0.02) & ~touched] > 0).mean() > 0.9


def _beside(shape: str) -> TaskSpec:
    """A cube that moves around something with an outside of its own."""
    size, x_m, apart, opening = {
        "socket": ([0.015, 0.015, 0.02], 0.5, 0.12, 0.0), "frame": ([0.044, 0.006, 0.015], 0.5, 0.13, 0.0),
        "drawer": ([0.1, 0.09, 0.04], 0.4, 0.25, 0.05),
    }[shape]  # fmt: skip
    content = load_task("lift").to_dict()
    content["objects"]["other"] = {"shape": shape, "size_m": size, "color": "gray"}
    content["initial"]["cube"] = {"x_m": [0.3, 0.7], "y_m": [-0.3, 0.3], "yaw_deg": [-45, 45]}
    content["initial"]["other"] = {"x_m": [x_m, x_m], "y_m": [0.0, 0.0], "yaw_deg": [-45, 45]}
    if opening:
        content["initial"]["other"]["opening_m"] = [opening, opening]
    return parse_task({**content, "min_distances": [["cube", "other", apart]]}, "beside.yaml")


def _collisions(env: TabletopVectorEnv, name: str, other: str) -> int:
    """Contacts between two objects, the second with its tray if it is a drawer, in all simulations."""
    model, found = env.model, 0
    bodies = model.body(name).id, model.body(other).id
    for slot in range(env.num_envs):
        pairs = env.batch.get_data(slot).contact.geom
        found += sum({int(model.body_rootid[model.geom_bodyid[geom]]) for geom in pair} == {*bodies} for pair in pairs)
    return found


@pytest.mark.parametrize("shape", ["peg and socket", "socket", "frame", "drawer"])
def test_a_moving_object_keeps_clear_of_the_outside_of_others(shape: str) -> None:
    task, name, other = (load_task("insert"), "peg", "socket") if " " in shape else (_beside(shape), "cube", "other")
    env = make_vector_env(task, 16, observe="state", motion=dataclasses.replace(FAST, object_moves_s=60.0))
    first = env.reset(seed=0)[0]["object_state"]
    swept, touches = np.zeros(16), 0
    for step in range(160):
        up = 0.05 if step % 2 else -0.05
        after = env.step(np.tile(np.array([0, 0, up, 0, 0, 0, 1], np.float32), (16, 1)))[0]["object_state"]
        swept = np.maximum(swept, np.linalg.norm(after[:, :2] - first[:, :2], axis=-1))
        touches += _collisions(env, name, other)
    assert touches == 0
    assert np.median(swept) > 0.05, "and it does move"


@pytest.mark.parametrize("shape", ["socket", "frame", "drawer"])
def test_the_circle_that_others_keep_clear_of_is_that_of_the_model(shape: str) -> None:
    env = make_vector_env(_beside(shape), 4, observe="state")
    env.reset(seed=0)
    middle, radius = footprint(env._scene(), env.task.object("other"))
    for slot in range(4):
        data, reach = env.batch.get_data(slot), 0.0
        for geom in env.objects["other"].geoms:
            corners = np.array(list(itertools.product((-1, 1), repeat=3))) * env.model.geom_size[geom]
            placed = corners @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
            reach = max(reach, float(np.linalg.norm(placed[:, :2] - middle[slot], axis=-1).max()))
        assert radius[slot] == pytest.approx(reach, abs=1e-6)


def test_a_point_moves_until_it_is_reached() -> None:
    env = make_vector_env("reach", 8, observe="state", motion=FAST)
    still: list[float] = []

    class Speeds(Listener):
        def on_step(self, step: Step) -> None:
            speed = np.hypot(*(step.info["scene_motion"][f"goal_v{axis}_m_s"] for axis in "xy"))
            still.extend(speed == 0)

    results = rollout(env, ScriptedExpert(env.task, env.embodiment), range(30), listeners=[Speeds()])
    assert sum(result.success for result in results) >= 28
    assert not np.any(still)


def test_displaced_camera_keeps_looking_at_the_same_point_of_the_table() -> None:
    env = make_vector_env("pick_place", 1, image_size=32)
    env.reset(seed=0)
    index = env.model.camera("front").id
    position, matrix = env.fields["cam_xpos"][0, index], env.fields["cam_xmat"][0, index].reshape(3, 3)
    centre = position - matrix[:, 2] * (position[2] / -matrix[2, 2]) * -1.0
    assert abs(centre[2]) < 1e-9
    for offsets in ((0.0, 0.0, 0.0), (25.0, 0.0, 0.0), (-30.0, 0.1, -0.1), (10.0, -0.08, 0.1)):
        moved, turned = displace_camera(position, matrix, np.array(offsets))
        assert np.allclose(turned.T @ turned, np.eye(3))
        seen = turned.T @ (centre - moved)
        assert np.allclose(seen[:2], 0.0, atol=1e-9)
        assert seen[2] < 0
        radius = np.hypot(*(position - centre)[:2])
        assert np.isclose(np.hypot(*(moved - centre)[:2]), radius + offsets[1])
        assert np.isclose(moved[2], position[2] + offsets[2])
    same = displace_camera(position, matrix, np.zeros(3))
    assert np.allclose(same[0], position)
    assert np.allclose(same[1], matrix)


def test_moving_cameras_change_the_image_and_are_logged() -> None:
    env = make_vector_env("pick_place", 2, image_size=32, motion="move_views")
    first = env.reset(seed=3)[0]["front_image"]
    images, azimuths, logged = [first], [], []
    for _ in range(12):
        observation, *_, info = env.step(DRIVEN[:2])
        images.append(observation["front_image"])
        azimuths.append(info["scene_motion"]["camera_azimuth_deg"])
        logged.append([info["scene_motion"][f"front_{letter}_m"] for letter in "xyz"])
    low, high = SCENE_MOTIONS["move_views"].camera_azimuth_deg
    assert np.min(azimuths) >= low
    assert np.max(azimuths) <= high
    assert np.ptp(azimuths, axis=0).min() > 0.5
    assert np.ptp(np.array(logged), axis=0).max(axis=0).min() > 1e-3
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(images))


def test_logged_offsets_and_poses_of_a_camera_are_those_of_the_picture_that_the_step_answered() -> None:
    env = make_vector_env("pick_place", 2, image_size=32, motion="move_views")
    env.reset(seed=3)
    camera = next(camera for camera in env.embodiment.cameras if camera.name == "front")
    nominal = np.array(camera.position_m), rotation.to_matrix(np.array(camera.quaternion_wxyz))
    for _ in range(5):
        drawn = env._mover.camera_offsets.copy()
        log = env.step(DRIVEN[:2])[4]["scene_motion"]
        offsets = np.stack([log[f"camera_{name}"] for name in ("azimuth_deg", "distance_m", "height_m")], axis=-1)
        np.testing.assert_array_equal(offsets, drawn)
        poses = np.stack([log[f"front_{letter}_m"] for letter in "xyz"], axis=-1)
        np.testing.assert_allclose(poses, [displace_camera(*nominal, offset)[0] for offset in offsets], atol=1e-9)
    assert not np.array_equal(env._mover.camera_offsets, drawn)


def test_another_motion_begins_with_the_next_reset_of_all() -> None:
    env, same = (make_vector_env("pick_place", 4, observe="state", motion=FAST) for _ in range(2))
    env.reset(seed=0)
    same.reset(seed=0)
    for step in range(10):
        if step == 4:
            env.set_motion(None)
        if step == 6:
            one = {"seed": [None, 9, None, None], "options": {"reset_mask": np.arange(4) == 1}}
            env.reset(**one)
            same.reset(**one)
        (observation, *_, info), (expected, *_, log) = env.step(DRIVEN[:4]), same.step(DRIVEN[:4])
        np.testing.assert_array_equal(observation["object_state"], expected["object_state"])
        assert info["scene_motion"].keys() == log["scene_motion"].keys()
    assert env.motion == FAST
    before = env.reset(seed=0)[0]["object_state"]
    observation, *_, info = env.step(DRIVEN[:4])
    assert env.motion == SCENE_MOTIONS["none"]
    assert "scene_motion" not in info
    np.testing.assert_allclose(observation["object_state"], before, atol=1e-4)
    with pytest.raises(ConfigError, match="unknown scene motion"):
        env.set_motion("mve")


def test_views_differ_between_episodes_and_rest_within_one() -> None:
    env = make_vector_env("pick_place", 4, image_size=32, motion="views")
    env.reset(seed=0)
    logs = [env.step(DRIVEN[:4])[4]["scene_motion"]["camera_azimuth_deg"] for _ in range(3)]
    assert np.array_equal(logs[0], logs[2])
    assert len(np.unique(logs[0])) == 4


@pytest.mark.parametrize(("cameras", "observe"), [((), "state"), (("wrist",), "image")])
def test_without_a_camera_in_the_world_none_is_said_to_move(cameras: tuple[str, ...], observe: str) -> None:
    options = {"observe": observe, "image_size": 16, "cameras": cameras}
    for motion, other in (("move_views", "move"), ("move", None)):
        env, same = (make_vector_env("pick_place", 2, motion=name, **options) for name in (motion, other))
        env.reset(seed=3)
        same.reset(seed=3)
        for _ in range(5):
            (observation, *_, info), (expected, *_) = env.step(DRIVEN[:2]), same.step(DRIVEN[:2])
        assert {name for name in info["scene_motion"] if "camera" in name or "front" in name} == set()
        assert np.abs(info["scene_motion"]["cube_vx_m_s"]).min() > 0
        assert other is None or np.array_equal(observation["object_state"], expected["object_state"])
    turning = SceneMotion(camera_azimuth_deg=(-10.0, 10.0), camera_turn_deg_s=30.0)
    for motion in ("views", turning):
        with pytest.raises(ConfigError, match=rf"and there is none \(cameras: {cameras[0] if cameras else 'none'}\)"):
            make_vector_env("pick_place", 2, motion=motion, **options)


def test_bad_settings_name_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="marks nothing that may move"):
        make_vector_env("drawer_open", 1, observe="state", motion="move")
    with pytest.raises(ConfigError, match=r"unknown scene motion 'mve'.*move"):
        load_motion("mve")
    with pytest.raises(ConfigError, match="camera 'front' within"):
        make_vector_env("lift", 1, motion=SceneMotion(camera_distance_m=(-1.5, -1.0)))
    with pytest.raises(ConfigError, match="has no 'speed'"):
        load_motion({"speed": 1.0})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("object_speed_m_s", "fast", "'fast'; expected a number from 0 to 1"),
        ("object_speed_m_s", None, "None; expected a number"),
        ("object_speed_m_s", True, "True; expected a number"),
        ("object_speed_m_s", 50, "50; expected a number from 0 to 1"),
        ("object_speed_m_s", float("nan"), "nan; expected a number"),
        ("target_speed_m_s", [0.1, 0.3], r"\(0.1, 0.3\); expected a number"),
        ("object_turn_deg_s", 720.0, "720.0; expected a number from 0 to 180"),
        ("camera_turn_deg_s", -1.0, "-1.0; expected a number from 0 to 180"),
        ("camera_slide_m_s", 20.0, "20.0; expected a number from 0 to 1"),
        ("object_moves_s", float("inf"), "inf; expected a number from 0 to 3600"),
        ("camera_azimuth_deg", 5, "5; expected two numbers from -180 to 180"),
        ("camera_azimuth_deg", [1, "a"], r"\(1, 'a'\); expected two numbers"),
        ("camera_azimuth_deg", [10.0, -10.0], r"\(10.0, -10.0\); expected \(low, high\), low <= high"),
        ("camera_azimuth_deg", [float("nan"), 10.0], r"\(nan, 10.0\); expected two numbers"),
        ("camera_distance_m", [-1e9, 1e9], "expected two numbers from -2 to 2"),
        ("speed_beta", [1e-320, 1.0], "expected two numbers from 0.01 to 100"),
        ("correlated", "no", "'no'; expected true or false"),
    ],
)
def test_values_that_are_no_motion_are_refused(tmp_path: Path, name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"scene motion '{name}' is {expected}" if expected[0] != "e" else expected):
        load_motion({name: value})
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({name: value}))
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .*'{name}"):
        load_motion(str(file))


def test_motion_survives_json_and_yaml(tmp_path: Path) -> None:
    motion = SCENE_MOTIONS["move_views"]
    assert load_motion(json.loads(json.dumps(motion.to_dict()))) == motion
    file = tmp_path / "motion.yaml"
    file.write_text(yaml.safe_dump(motion.to_dict()))
    assert load_motion(str(file)) == motion


def test_collection_ends_with_its_budget_of_steps(tmp_path: Path) -> None:
    plan = CollectionPlan(
        output=tmp_path / "a", task="pick_place", steps=300, image_size=16, cameras=("front",), workers=1, num_envs=4,
        motion=SCENE_MOTIONS["move_views"],
    )  # fmt: skip
    result = collect(plan)
    spent = [outcome.steps for outcome in result.outcomes]
    assert sum(spent) >= 300 > sum(spent[:-1])
    dataset = Dataset.open(tmp_path / "a")
    assert dataset.masks["move"] == [episode.name for episode in dataset.episodes]
    assert load_motion(dataset.episodes[0].extra["motion"]) == SCENE_MOTIONS["move_views"]
    arrays = dataset.read(dataset.episodes[0])
    columns = dataset.episodes[0].columns["scene_motion"]
    assert arrays["step/scene_motion"].shape == (dataset.episodes[0].steps, len(columns))
    # The plate is only moved once the cube is held: the recorded velocity is that of the recorded positions.
    moved = np.diff(arrays["obs/object_state"][:, 0], append=np.nan)[:-1]
    velocity = arrays["step/scene_motion"][:-1, columns.index("cube_vx_m_s")]
    kinematic = velocity != 0
    assert kinematic.any()
    assert np.allclose(moved[kinematic], velocity[kinematic] * 0.05, atol=2e-3)
    assert collect(plan).session == 0
    with pytest.raises(ConfigError, match="motion"):
        collect(dataclasses.replace(plan, motion=SceneMotion()))
    with pytest.raises(ConfigError, match="one of the two"):
        dataclasses.replace(plan, episodes=3)


def test_twin_moves_its_scene_the_same_way_once_the_arm_is_driven() -> None:
    env = make_vector_env("pick_place", 1, observe="state", motion="move")
    world = TwinWorld(env.task, env.embodiment, "none", "move")
    env.reset(seed=[7])
    world.begin(7)
    before = world.truth()["object_state"]
    for _ in range(20):
        world.tick()
    assert np.allclose(world.truth()["object_state"], before, atol=1e-4)
    pose = world._position[0].copy(), world._quaternion[0].copy()
    for _ in range(10):
        pose[0][2] += 0.002
        for _ in range(round(0.05 / TICK_S)):
            world.command_pose(*pose)
            world.tick()
        moved = env.step(DRIVEN[:1])[0]["object_state"][0]
    assert np.linalg.norm(moved[:2] - np.array(before)[:2]) > 0.005
    assert np.allclose(np.array(world.truth()["object_state"])[:2], moved[:2], atol=2e-3)
    assert world.truth()["scene_motion"]["speed_factor_object"] > 0
    world.set_motion(None)
    assert world.truth()["scene_motion"], "the running episode goes on"
    world.begin(7)
    assert world.truth()["scene_motion"] == {}


@pytest.mark.parametrize("task", ["pick_place", "stack", "insert", "lift", "push", "reach"])
def test_expert_goes_along_with_exactly_what_moved(task: str) -> None:
    """What is subtracted from a label is what the demonstrator followed, also while the gripper closes."""

    class Noting(ScriptedExpert):
        def _scene_displacement(self, scene, memory):  # type: ignore[no-untyped-def]
            followed = super()._scene_displacement(scene, memory)
            notes.setdefault(memory.number, []).append(followed)
            return followed

    class Moved(Listener):
        def on_step(self, step: Step) -> None:
            rates = step.info["scene_motion"]
            for row, seed in enumerate(step.info["init_id"]):
                velocity = [sum(v[row] for k, v in rates.items() if k.endswith(f"_v{axis}_m_s")) for axis in "xy"]
                moved.setdefault(int(seed), []).append(np.array(velocity) * 0.05)

    notes: dict[int, list[np.ndarray]] = {}
    moved: dict[int, list[np.ndarray]] = {}
    slow = OperatorStyle(speed=0.3, gain=0.3)
    spec = dataclasses.replace(load_task(task), horizon=300)
    env = make_vector_env(spec, 12, observe="state", motion="move")
    rollout(env, Noting(spec, env.embodiment, style=slow), range(12), listeners=[Moved()])
    following = 0
    for seed in range(12):
        followed, happened = np.array(notes[seed]), np.array(moved[seed])
        apart = np.linalg.norm(followed[1:] - happened[:-1], axis=-1)
        # What slides by itself after it was let go is followed too, which is right.
        assert (apart[np.any(happened[:-1] != 0, axis=-1)] < 2e-4).all()
        following += int(np.any(happened != 0, axis=-1).sum())
    assert following > 100


def test_labels_relative_to_the_scene_are_those_of_a_scene_at_rest() -> None:
    """A hand that goes along with an object, one step behind, does nothing as seen from the object."""
    velocity = np.array([0.4, -0.2, 0.0, 0.0, 0.0, 0.0, 0.0], np.float32)
    own = np.array([0.0, 0.1, -0.3, 0.0, 0.0, 0.0, 1.0], np.float32)
    displacement = np.repeat(velocity[None], 10, axis=0)
    displacement[6:] = 0.0
    actions = np.repeat(own[None], 10, axis=0)
    actions[1:] += displacement[:-1]
    arrays = [{"actions": actions, "obs/proprio": np.zeros((10, 2), np.float32)}]
    windows = WindowSampler(arrays, horizon=4, keys=("proprio",), displacement=[displacement])
    assert np.allclose(windows.actions, own, atol=1e-6)
    batch = windows.batch(np.arange(10))
    assert np.allclose(batch["actions"][batch["action_mask"]], own, atol=1e-6)
    plain = WindowSampler(arrays, horizon=4, keys=("proprio",)).batch(np.array([1]))["actions"][0]
    assert np.allclose(plain, own + velocity)


def test_nothing_moves_before_the_arm_is_driven() -> None:
    env = make_vector_env("pick_place", 8, observe="state", motion=FAST)
    before = env.reset(seed=0)[0]["object_state"]
    for _ in range(30):
        observation, *_, info = env.step(IDLE)
    assert np.allclose(observation["object_state"], before, atol=1e-4)
    assert not np.any(info["scene_motion"]["cube_vx_m_s"])
    env.step(DRIVEN)
    # From the first motion on it goes its way, also while the operator rests.
    assert np.linalg.norm(env.step(IDLE)[0]["object_state"][:, :2] - before[:, :2], axis=1).min() > 0


def test_expert_in_a_moving_scene_acts_as_in_one_at_rest() -> None:
    """Relative to the scene, the expert's approach is the one it takes to an object that rests: same speed, no lag."""
    style = OperatorStyle(speed=0.3, gain=0.3)
    slow = dataclasses.replace(FAST, object_speed_m_s=0.3, object_turn_deg_s=0.0, object_moves_s=20.0)
    lengths = []
    for motion in (None, slow):
        env = make_vector_env(dataclasses.replace(load_task("lift"), horizon=300), 20, observe="state", motion=motion)
        results = rollout(env, ScriptedExpert(env.task, env.embodiment, style=style), range(20))
        assert all(result.success for result in results)
        lengths.append(np.mean([result.steps for result in results]))
    assert abs(lengths[1] - lengths[0]) < 4


def test_training_data_relate_actions_to_the_scene(tmp_path: Path) -> None:
    plan = CollectionPlan(
        output=tmp_path / "a", task="pick_place", episodes=3, image_size=16, cameras=("front",), workers=1, num_envs=3,
        motion=FAST,
    )  # fmt: skip
    collect(plan)
    config = BCConfig(image_keys=(), horizon=8)
    related, plain = (open_training_data(plan.output, config, scene_frame=flag) for flag in (True, False))
    assert related.fingerprint() != plain.fingerprint()
    indices = np.arange(len(plain.train))
    a, b = related.train.batch(indices)["actions"], plain.train.batch(indices)["actions"]
    changed = np.abs(a - b).max(axis=(0, 1))
    assert (changed[[0, 1, 5]] > 0.05).all()
    assert (changed[[2, 3, 4, 6]] == 0).all()


def test_a_socket_stands_still_once_the_peg_is_in_it() -> None:
    class Inside(Listener):
        moved_inside = 0

        def on_step(self, step: Step) -> None:
            motion, state = step.info["scene_motion"], step.next_observation["object_state"]
            moving = np.hypot(motion["socket_vx_m_s"], motion["socket_vy_m_s"]) > 0
            across = np.linalg.norm(state[:, :2] - state[:, 7:9], axis=-1)
            below_rim = state[:, 2] - peg.half_height_m < socket.height_m
            self.moved_inside += int((moving & (across < 0.015) & below_rim).sum())

    env = make_vector_env("insert", 8, observe="state", motion="move")
    peg, socket = env.task.object("peg"), env.task.object("socket")
    inside = Inside()
    results = rollout(env, ScriptedExpert(env.task, env.embodiment), range(16), listeners=[inside])
    assert sum(result.success for result in results) >= 14
    assert inside.moved_inside == 0

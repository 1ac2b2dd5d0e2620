"""Task specifications: every mistake is reported with file, key and the closest valid name."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import yaml

from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.envs import make_env, panda_embodiment
from simtoreal.envs.errors import TaskError
from simtoreal.envs.predicates import SceneView, parse_predicate
from simtoreal.envs.task import ObjectSpec, sample_initial_condition
from simtoreal.envs.task_file import list_tasks, load_task, parse_task, parse_task_text

DRAWER = {"shape": "drawer", "size_m": [0.1, 0.09, 0.04], "color": "brown"}


@pytest.fixture
def content() -> dict:
    return copy.deepcopy(load_task("pick_place").to_dict())


@pytest.mark.parametrize("name", list_tasks())
def test_shipped_tasks_survive_a_round_trip(name):
    task = load_task(name)
    assert parse_task(yaml.safe_load(yaml.safe_dump(task.to_dict(), sort_keys=False))) == task
    assert task.plan, "every shipped task has a scripted plan"
    assert task.instructions


def test_a_task_can_be_sent_to_another_process():
    task = load_task("avoid")
    assert task.goal_predicate
    sent = pickle.loads(pickle.dumps(task))
    assert sent == task
    assert sent.source == task.source
    assert sent.behavior_predicates.keys() == task.behavior_predicates.keys()
    assert copy.deepcopy(task) == task
    env = make_env(task, observe="state")
    assert pickle.loads(pickle.dumps(env)).task == task


def test_unknown_task_names_the_closest():
    with pytest.raises(TaskError, match="Did you mean 'pick_place'"):
        load_task("pickplace")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"nothing\.yaml' does not exist"):
        load_task(str(tmp_path / "nothing.yaml"))


def test_malformed_yaml_names_the_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: [unclosed")
    with pytest.raises(TaskError, match=r"broken\.yaml: not valid yaml"):
        load_task(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(horizon="long"), r"key 'horizon' must be a positive whole number .* got 'long'"),
        (lambda c: c.pop("goal"), "key 'goal' is missing"),
        (lambda c: c.update(gaol="x"), "unknown key 'gaol'. Did you mean 'goal'"),
        (lambda c: c["objects"]["cube"].update(shape="bok"), "key 'objects.cube.shape' is 'bok'. Did you mean 'box'"),
        (lambda c: c["objects"]["cube"].update(size_m=[0.02]), r"'objects.cube.size_m' must be 3 lengths"),
        (lambda c: c["objects"]["cube"].update(color="rad"), "Did you mean 'red'"),
        (lambda c: c["objects"]["cube"].update(mass_kg=-1.0), "'objects.cube.mass_kg' must be positive"),
        (lambda c: c["initial"].pop("plate"), "key 'initial.plate' is missing"),
        (lambda c: c["initial"]["cube"].update(x_m=[0.6, 0.4]), "low <= high"),
        (lambda c: c.update(goal="onn(cube, plate)"), "goal: unknown predicate 'onn'. Did you mean 'on'"),
        (
            lambda c: c.update(goal="on(cub, plate)"),
            "on got 'cub' where it needs an object that can be moved. Did you mean 'cube'",
        ),
        (lambda c: c.update(goal="on(cube)"), "takes 2 arguments, got 1"),
        (lambda c: c.update(goal="on(cube, plate"), "cannot read predicate"),
        (lambda c: c.update(goal="__import__('os')"), "unknown predicate '__import__'"),
        (lambda c: c.update(goal="lifted(cube, high)"), "expects a number in metres"),
        (lambda c: c["plan"][0].update(skill="pik"), r"\[0\].skill' is 'pik'. Did you mean 'pick'"),
        (lambda c: c["plan"][0].update(object="cubes"), "names object 'cubes'. Did you mean 'cube'"),
        (lambda c: c.update(min_distances=[["cube", "plat", 0.1]]), "names object 'plat'. Did you mean 'plate'"),
        (lambda c: c.update(min_distances=[["cube", "plate", float("nan")]]), "key 'min_distances' must be"),
        (lambda c: c["objects"]["cube"].update(mass_kg=float("nan")), "'objects.cube.mass_kg' must be .* got nan"),
        (lambda c: c["objects"]["cube"].update(friction=float("inf")), "'objects.cube.friction' must be .* got inf"),
        (lambda c: c["objects"]["cube"].update(size_m=[0.02, 0.02, float("nan")]), "'objects.cube.size_m' must be"),
        (lambda c: c["objects"]["cube"].update(mass_kg=10**400), "'objects.cube.mass_kg' must be"),
        (lambda c: c["initial"]["cube"].update(x_m=[float("nan"), 0.4]), "'initial.cube.x_m' must be"),
        (lambda c: c.update(goal="lifted(cube, 1e999)"), "expects a number in metres"),
        (lambda c: c.update(objects={}), "key 'objects' must be a mapping with at least one object"),
        (lambda c: c["objects"].update({True: c["objects"].pop("cube")}), "'objects.True' must be a name; yaml reads"),
        (
            lambda c: (
                c["objects"].update(box=DRAWER),
                c["initial"].update(box={"x_m": [0.7, 0.7], "y_m": [0, 0], "opening_m": [-0.1, -0.1]}),
            ),
            r"box.opening_m' must be within 0 to",
        ),
    ],
)
def test_mistakes_name_key_and_fix(content, edit, message):
    edit(content)
    with pytest.raises(TaskError, match=message):
        parse_task(content, "mine.yaml")


@pytest.mark.parametrize("name", ["hand", "link3", "left_finger", "table", "world", "tcp", "cabinet_tray", "my cube"])
def test_names_that_the_scene_uses_are_refused(content, name):
    drawer = {"shape": "drawer", "size_m": [0.1, 0.09, 0.04], "color": "brown"}
    content["objects"] |= {"cabinet": drawer, name: content["objects"]["cube"]}
    content["initial"] |= {"cabinet": content["initial"]["cube"], name: content["initial"]["cube"]}
    with pytest.raises(TaskError, match=rf"mine\.yaml: key 'objects\.{name}' must be an identifier that the scene"):
        parse_task(content, "mine.yaml")


def test_files_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: dépôt".encode("latin-1"))
    with pytest.raises(TaskError, match=r"latin\.yaml': .*UTF-8"):
        load_task(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["initial"]["cube"].update(x_m=[1.4, 1.5]), r"'initial\.cube\.x_m' is 1\.4; expected 0\.05 to"),
        (lambda c: c["initial"]["cube"].update(z_m=[-0.1, 0.1]), r"'initial\.cube\.z_m' is -0\.1; expected 0\.02 to"),
        (lambda c: c["initial"].update(cube=c["initial"]["plate"] | {"x_m": [0.5, 0.5], "y_m": [0, 0]},
                                       plate={"x_m": [0.5, 0.51], "y_m": [0, 0]}), "'cube' and 'plate' are put inside"),
        (lambda c: c["objects"]["cube"].update(size_m=[9, 9, 9]), r"'objects\.cube\.size_m' is 9; expected 0\.0005"),
        (lambda c: c["objects"]["cube"].update(mass_kg=1e-30), r"'objects\.cube\.mass_kg' is 1e-30; expected 0\.001"),
        (lambda c: c["initial"]["cube"].update(yaw_deg=[-1e308, 1e308]), r"'initial\.cube\.yaw_deg' is -1e\+308; exp"),
        (lambda c: c["initial"]["cube"].update(opening_m=[0, 0.1]), r"'initial\.cube\.opening_m' is for drawers"),
        (lambda c: (c["objects"].update(box=DRAWER | {"size_m": [0.1, 0.01, 0.04]}),
                    c["initial"].update(box={"x_m": [0.7, 0.7], "y_m": [0, 0]})),
         r"'objects\.box\.size_m' is 0\.01; expected 0\.03 to 0\.5 m for the half_width of a drawer"),
        (lambda c: c["objects"]["plate"].update(mass_kg=3.0),
         r"'objects\.plate\.mass_kg' is for what can be moved; leave it out for a plate"),
        (lambda c: c.update(horizon=4), "key 'horizon' is 4; expected 5 control steps or more"),
        (lambda c: c.update(moving={"object": "cube", "target": "cube"}), "key 'moving' names 'cube' twice"),
        (lambda c: c.update(min_distances=[["cube", "plate", -1]]), "key 'min_distances' is -1 m for 'cube' and"),
        (lambda c: c.update(min_distances=[["cube", "cube", 0.1]]), "key 'min_distances' names 'cube' twice"),
        (lambda c: c.update(goal="released(cube) and stacked(cube, cube)"),
         r"goal: stacked\(cube, cube\) relates 'cube' to itself; expected two objects"),
        (lambda c: c.update(failure="at(tcp, tcp, 0.1)"), r"failure: at\(tcp, tcp, 0\.1\) relates 'tcp' to itself"),
        (lambda c: c.update(failure="  " + c["goal"].replace(", ", ",")), "another predicate than that of the goal"),
        (lambda c: c.update(goal="at(tcp, cube, 0)"), "goal: at got '0' where it needs more than 0 metres"),
        (lambda c: c.update(milestones={"over": "not above(cube, plate, 0.0)"}), r"milestones\.over: above got '0\.0'"),
        (lambda c: c.update(behaviors={"way": {"a": "aligned(cube, plate, 0.1, 0)", "b": "past(cube, plate)"}}),
         r"behaviors\.way\.a: aligned got '0' where it needs more than 0 degrees"),
        (lambda c: c.update(name="../mine"), r"key 'name' is '\.\./mine'; expected letters"),
        (lambda c: c.update(goal="not " * 3000 + "lifted(cube, 0.1)"), "goal: a predicate of 12017 characters"),
    ],
)  # fmt: skip
def test_scenes_that_cannot_be_simulated_are_refused(content, edit, message):
    edit(content)
    with pytest.raises(TaskError, match=rf"mine\.yaml.*{message}"):
        parse_task_text(yaml.safe_dump(content), "mine.yaml")


def test_tasks_that_were_stored_before_they_were_refused_are_read(content):
    content["objects"]["plate"]["mass_kg"] = 3.0
    content |= {"horizon": 1, "min_distances": [["cube", "plate", -1]], "moving": {"object": "cube", "target": "cube"}}
    content["goal"] = "on(cube, plate) or above(cube, cube, 0)"
    assert parse_task(content, "data/meta.json").horizon == 1


def test_heights_may_be_0(content):
    content["goal"] = "lifted(cube, 0) and not below(cube, 0)"
    assert parse_task_text(yaml.safe_dump(content), "mine.yaml").goal == content["goal"]


PICK = {"skill": "pick", "object": "cube"}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            [{"skill": "lift", "object": "cube", "height_m": 0.1}],
            r"\[0\]' needs 'cube' in the gripper; add {skill: pick",
        ),
        ([{"skill": "place", "object": "cube", "onto": "plate"}, PICK], r"\[0\]' needs 'cube' in the gripper"),
        ([{"skill": "open", "drawer": "cube"}], r"\[0\]\.drawer' names 'cube', a box; 'open' needs a drawer there"),
        ([PICK, {"skill": "insert", "object": "cube", "into": "plate"}], r"\[1\]\.into' names 'plate', a plate"),
        ([{"skill": "pick", "object": "plate"}], "'pick' needs a box or cylinder or sphere there"),
        ([{"skill": "align", "object": "cube", "to": "plate"}], "'align' needs a frame there"),
        ([PICK, {"skill": "place", "object": "cube", "onto": "cube"}], r"\[1\]' names 'cube' twice"),
        ([PICK, {"skill": "lift", "object": "cube", "height_m": -5}], r"\[1\]\.height_m' is -5; expected more than 0"),
    ],
)
def test_plans_that_the_expert_cannot_follow_are_refused(content, plan, message):
    content["plan"] = plan
    with pytest.raises(TaskError, match=rf"mine\.yaml: key '.*{message}"):
        parse_task_text(yaml.safe_dump(content), "mine.yaml")
    # What is stored with data can be read, and is refused where it would be executed.
    with pytest.raises(TaskError, match=message):
        ScriptedExpert(parse_task(content, "mine.yaml"), panda_embodiment())


@pytest.mark.parametrize(
    ("shape", "size"), [("box", [0.05, 0.05, 0.02]), ("cylinder", [0.04, 0.03]), ("sphere", [0.05])]
)
def test_what_the_gripper_cannot_span_cannot_be_picked(content, shape, size):
    content["objects"]["cube"].update(shape=shape, size_m=size)
    width = f"{2 * size[0]:g}"
    with pytest.raises(
        TaskError, match=rf"mine\.yaml: key 'plan\[0\]\.object' names 'cube', .* {width} m wide .* opens 0\.08 m\. Make"
    ):
        parse_task_text(yaml.safe_dump(content), "mine.yaml")
    content["objects"]["cube"].update(shape="box", size_m=[0.05, 0.02, 0.02])
    parse_task_text(yaml.safe_dump(content), "mine.yaml")


def test_a_plan_that_weaves_needs_posts(content):
    content["objects"].pop("plate")
    content |= {"goal": "lifted(cube, 0.1)", "milestones": {}, "min_distances": [], "moving": {}}
    content["initial"].pop("plate")
    content["plan"] = [{"skill": "weave", "finish": "cube"}]
    with pytest.raises(
        TaskError, match=r"mine\.yaml: key 'plan\[0\]' weaves through rows of plates, and the task has n"
    ):
        parse_task_text(yaml.safe_dump(content), "mine.yaml")


def test_a_key_given_twice_is_named():
    with pytest.raises(TaskError, match=r"mine\.yaml: .*key 'x_m' is given twice, in lines 3 and 4"):
        parse_task_text("initial:\n  cube:\n    x_m: [0, 1]\n    x_m: [0, 2]\n", "mine.yaml")


def test_contradictory_distances_are_reported(content):
    content["min_distances"] = [["cube", "plate", 3.0]]
    task = parse_task_text(yaml.safe_dump(content), "mine.yaml")
    with pytest.raises(TaskError, match=r"mine\.yaml: no initial placement"):
        sample_initial_condition(task, np.random.default_rng(0))


def test_initial_conditions_are_inside_their_ranges_and_apart():
    task = load_task("pick_place")
    for seed in range(200):
        condition = sample_initial_condition(task, np.random.default_rng(seed))
        for index, item in enumerate(task.objects):
            spec = task.initial[item.name]
            assert spec.x_m[0] <= condition.positions[index, 0] <= spec.x_m[1]
            assert spec.y_m[0] <= condition.positions[index, 1] <= spec.y_m[1]
        assert np.hypot(*(condition.positions[0] - condition.positions[1])[:2]) >= 0.11
        assert condition.instruction in task.instructions


def _scene(cube_xyz, touches=(False, False)) -> SceneView:
    identity = np.array([[1.0, 0, 0, 0]])
    return SceneView(
        positions={
            "cube": np.array([cube_xyz]),
            "plate": np.array([[0.5, 0.1, 0.0]]),
            "tcp": np.array([[0.5, 0, 0.1]]),
        },
        quaternions={"cube": identity, "plate": identity, "tcp": identity},
        velocities={"cube": np.zeros((1, 3))},
        openings={},
        touches={"cube": np.array([touches]), "plate": np.zeros((1, 2), bool)},
        gripper_opening=np.ones(1),
    )


@pytest.mark.parametrize(
    ("text", "cube", "touches", "expected"),
    [
        ("on(cube, plate)", (0.5, 0.1, 0.026), (False, False), True),
        ("on(cube, plate)", (0.5, 0.1, 0.1), (False, False), False),
        ("on(cube, plate)", (0.5, 0.2, 0.026), (False, False), False),
        ("on(cube, plate) and released(cube)", (0.5, 0.1, 0.026), (True, False), False),
        ("grasped(cube)", (0.5, 0.1, 0.026), (True, False), False),
        ("grasped(cube)", (0.5, 0.1, 0.026), (True, True), True),
        ("not grasped(cube) or lifted(cube, 0.05)", (0.5, 0.1, 0.1), (True, True), True),
        ("left_of(cube, plate)", (0.5, 0.2, 0.02), (False, False), True),
        ("right_of(cube, plate)", (0.5, 0.2, 0.02), (False, False), False),
        ("at(tcp, cube, 0.03)", (0.5, 0.01, 0.1), (False, False), True),
        ("above(cube, plate, 0.05)", (0.5, 0.11, 0.3), (False, False), True),
        ("upright(cube) and still(cube)", (0.5, 0.11, 0.3), (False, False), True),
    ],
)
def test_predicates(text, cube, touches, expected):
    predicate = parse_predicate(text, load_task("pick_place").objects)
    assert predicate(_scene(cube, touches)).tolist() == [expected]


def _with_fixtures() -> tuple[ObjectSpec, ...]:
    return (
        *load_task("pick_place").objects,
        ObjectSpec(name="socket", shape="socket", size_m=(0.03, 0.01, 0.02), color="gray"),
        ObjectSpec(name="drawer", shape="drawer", size_m=(0.1, 0.09, 0.04), color="brown"),
        ObjectSpec(name="mark", shape="region", size_m=(0.03,), color="green"),
        ObjectSpec(name="point", shape="point", size_m=(0.02,), color="green"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inserted(cube, plate)", r"goal: inserted got 'plate' \(plate\) where it needs a socket. Valid: socket"),
        ("inserted(cube, mark)", "where it needs a socket"),
        ("inserted(cube, drawer)", "where it needs a socket"),
        ("on(cube, point)", r"on got 'point' \(point\) where it needs an object with a surface"),
        ("released(mark)", r"released got 'mark' \(region\) where it needs an object that can be touched"),
        ("grasped(point)", "where it needs an object that can be touched"),
    ],
)
def test_shapes_without_a_meaning_are_refused(text, message):
    with pytest.raises(TaskError, match=message):
        parse_predicate(text, _with_fixtures(), "goal")


@pytest.mark.parametrize(
    ("fixture", "offset", "height", "expected"),
    [
        ("drawer", (0.1, 0.0), "top", True),
        ("drawer", (0.18, 0.0), "top", True),
        ("drawer", (-0.08, 0.0), "table", False),
        ("drawer", (-0.08, 0.0), "top", False),
        ("socket", (0.0, 0.04), "top", True),
        ("socket", (0.0, 0.06), "top", False),
    ],
)
def test_what_stands_on_a_fixture(fixture, offset, height, expected):
    """``offset`` is along and across the fixture's axis, which is turned."""
    objects = {item.name: item for item in _with_fixtures()}
    half_turn = np.deg2rad(20.0) / 2
    axis = np.array([np.cos(2 * half_turn), np.sin(2 * half_turn)])
    place = np.array([0.5, 0.1]) + offset[0] * axis + offset[1] * np.array([-axis[1], axis[0]])
    base = objects[fixture].top_m if height == "top" else 0.0
    scene = _scene((*place, base + objects["cube"].half_height_m))
    scene.positions[fixture] = np.array([[0.5, 0.1, 0.0]])
    scene.quaternions[fixture] = np.array([[np.cos(half_turn), 0.0, 0.0, np.sin(half_turn)]])
    assert parse_predicate(f"on(cube, {fixture})", list(objects.values()))(scene).tolist() == [expected]

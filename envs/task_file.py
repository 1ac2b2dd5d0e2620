"""Reading task files: yaml to a validated :class:`~simtoreal.envs.task.TaskSpec`; mistakes name file and key."""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from simtoreal.envs.config import parse_yaml
from simtoreal.envs.errors import TaskError, closest
from simtoreal.envs.predicates import require_sense
from simtoreal.envs.scene_layout import (
    DRAWER_SMALLEST_M,
    DRAWER_TRAVEL_M,
    GRIPPER_OPENING_M,
    TABLE_CENTER_M,
    TABLE_HALF_M,
)
from simtoreal.envs.task import (
    CARRYING_SKILLS,
    COLORS,
    SHAPE_DIMENSIONS,
    SKILL_SHAPES,
    SKILLS,
    SUCCESS_HOLD_STEPS,
    InitialSpec,
    ObjectSpec,
    SkillStep,
    TaskSpec,
)

# Names that the scene itself uses; an object of the same name would be taken for a part of the robot.
RESERVED_NAMES = frozenset(
    {"world", "table", "tcp", "base", "gripper_down", "hand", "left_finger", "right_finger"}
    | {f"link{index}" for index in range(8)}
)

# What a simulation with steps of 5 ms, and a gripper, can deal with.
SIZE_M, MASS_KG, FRICTION = (0.0005, 0.5), (0.001, 20.0), (0.01, 10.0)
HIGHEST_M = 1.0
YAW_DEG = (-360.0, 360.0)
# The name is part of Gymnasium ids and of file names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _is_finite(value: Any) -> bool:
    """Whether a yaml value is a number that a computation can use: yaml also knows .nan and .inf."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


class _Reader:
    """Reads typed values out of parsed yaml and reports file, key and expected type."""

    def __init__(self, content: Any, source: str, path: str = "") -> None:
        self.source, self.path = source, path
        if not isinstance(content, Mapping):
            raise TaskError(f"{source}: '{path or 'document'}' must be a mapping, got {type(content).__name__}")
        self.content = content
        self.used: set[str] = set()

    def fail(self, key: str, expected: str, value: Any) -> TaskError:
        return TaskError(f"{self.source}: key '{self.join(key)}' must be {expected}, got {value!r}")

    def join(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, kind: type, expected: str, default: Any = ...) -> Any:
        self.used.add(key)
        if key not in self.content:
            if default is ...:
                raise TaskError(f"{self.source}: key '{self.join(key)}' is missing; it must be {expected}")
            return default
        value = self.content[key]
        if kind is float and _is_finite(value):
            value = float(value)
        elif kind is float:
            raise self.fail(key, expected, value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(key, expected, value)
        return value

    def numbers(self, key: str, count: int | None, expected: str, default: Any = ...) -> tuple[float, ...] | None:
        value = self.get(key, list, expected, default)
        if value is None or (value is default and default is not ...):
            return default  # type: ignore[no-any-return]
        if (count is not None and len(value) != count) or not all(_is_finite(entry) for entry in value):
            raise self.fail(key, expected, value)
        return tuple(float(entry) for entry in value)

    def interval(self, key: str, default: Any = ...) -> Any:
        value = self.numbers(key, 2, "a list [low, high] of two numbers", default)
        if value is not None and value[0] > value[1]:
            raise self.fail(key, "a list [low, high] with low <= high", list(value))
        return value

    def finish(self) -> None:
        for key in self.content:
            if key not in self.used:
                raise TaskError(f"{self.source}: unknown key '{self.join(str(key))}'. {closest(str(key), self.used)}")


def parse_task(content: Any, source: str = "task") -> TaskSpec:
    """Turn the parsed yaml of a task into a validated specification.

    Args:
        content: mapping as read by ``yaml.safe_load``.
        source: file name for messages.

    Raises:
        TaskError: names the file, the key, the expected type or the closest valid name.
    """
    reader = _Reader(content, source)
    objects = _parse_objects(reader)
    names = [item.name for item in objects]
    initial_reader = _Reader(reader.get("initial", dict, "a mapping of object name to ranges"), source, "initial")
    initial = {}
    for item in objects:
        entry = _Reader(
            initial_reader.get(item.name, dict, "a mapping with x_m, y_m, yaw_deg"), source, f"initial.{item.name}"
        )
        opening = entry.interval("opening_m", (0.0, 0.0))
        if item.articulated and not 0 <= opening[0] <= opening[1] <= DRAWER_TRAVEL_M:
            raise entry.fail("opening_m", f"within 0 to {DRAWER_TRAVEL_M} m", list(opening))
        initial[item.name] = InitialSpec(
            x_m=entry.interval("x_m"), y_m=entry.interval("y_m"), z_m=entry.interval("z_m", None),
            yaw_deg=entry.interval("yaw_deg", (0.0, 0.0)), opening_m=opening,
        )  # fmt: skip
        entry.finish()
    initial_reader.finish()
    moving = _parse_moving(reader, objects)
    spec = TaskSpec(
        name=reader.get("name", str, "a string"),
        description=reader.get("description", str, "a string", ""),
        horizon=reader.get("horizon", int, "a positive whole number of control steps"),
        instructions=_parse_instructions(reader),
        objects=objects,
        initial=initial,
        min_distances=_parse_distances(reader, names),
        goal=reader.get("goal", str, "a predicate such as 'on(cube, plate)'"),
        milestones=_parse_milestones(reader),
        plan=_parse_plan(reader, names),
        moving_object=moving.get("object", ""),
        moving_target=moving.get("target", ""),
        failure=reader.get("failure", str, "a predicate such as 'not released(post)'", ""),
        behaviors=_parse_behaviors(reader),
        source=source,
    )
    reader.finish()
    if spec.horizon < 1:
        raise reader.fail("horizon", "a positive whole number of control steps", spec.horizon)
    if "".join(spec.failure.split()) == "".join(spec.goal.split()):
        raise reader.fail("failure", "another predicate than that of the goal, or nobody could succeed", spec.failure)
    _ = spec.goal_predicate, spec.milestone_predicates, spec.failure_predicate, spec.behavior_predicates
    return spec


def _parse_objects(reader: _Reader) -> tuple[ObjectSpec, ...]:
    content = _Reader(reader.get("objects", dict, "a mapping of name to object"), reader.source, "objects")
    # A drawer has a second body; see scene.py.
    taken = RESERVED_NAMES | {f"{name}_tray" for name in content.content}
    parsed = []
    if not content.content:
        raise reader.fail("objects", "a mapping with at least one object", dict(content.content))
    for name in content.content:
        if not isinstance(name, str):
            raise content.fail(str(name), f"a name; yaml reads this one as {name!r}, unless it is quoted", name)
        if not name.isidentifier() or name in taken:
            raise content.fail(name, f"an identifier that the scene does not use ({_listed(taken)})", name)
        entry = _Reader(
            content.get(name, dict, "a mapping with shape, size_m, color"), reader.source, f"objects.{name}"
        )
        shape = entry.get("shape", str, "a shape name")
        if shape not in SHAPE_DIMENSIONS:
            raise TaskError(
                f"{reader.source}: key 'objects.{name}.shape' is '{shape}'. {closest(shape, SHAPE_DIMENSIONS)}"
            )
        dimensions = SHAPE_DIMENSIONS[shape]
        expected = f"{len(dimensions)} lengths in metres: {', '.join(dimensions)}"
        size = entry.numbers("size_m", len(dimensions), expected)
        assert size is not None
        if min(size) <= 0:
            raise entry.fail("size_m", f"positive {expected}", list(size))
        color = entry.get("color", str, "a color name")
        if color not in COLORS:
            raise TaskError(f"{reader.source}: key 'objects.{name}.color' is '{color}'. {closest(color, COLORS)}")
        mass = entry.get("mass_kg", float, "a positive mass in kg", 0.05)
        friction = entry.get("friction", float, "a positive friction coefficient", 1.0)
        for key, value in (("mass_kg", mass), ("friction", friction)):
            if value <= 0:
                raise entry.fail(key, "positive", value)
        parsed.append(ObjectSpec(name=name, shape=shape, size_m=size, color=color, mass_kg=mass, friction=friction))
        entry.finish()
    return tuple(parsed)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _parse_instructions(reader: _Reader) -> tuple[str, ...]:
    value = reader.get("instructions", list, "a list with at least one sentence")
    if not value or not all(isinstance(entry, str) and entry.strip() for entry in value):
        raise reader.fail("instructions", "a list with at least one sentence", value)
    return tuple(value)


def _parse_distances(reader: _Reader, names: list[str]) -> tuple[tuple[str, str, float], ...]:
    expected = "a list of [object, object, metres]"
    parsed = []
    for entry in reader.get("min_distances", list, expected, []):
        if not isinstance(entry, list) or len(entry) != 3 or not _is_finite(entry[2]):
            raise reader.fail("min_distances", expected, entry)
        for name in entry[:2]:
            if name not in names:
                raise TaskError(
                    f"{reader.source}: key 'min_distances' names object '{name}'. {closest(str(name), names)}"
                )
        parsed.append((entry[0], entry[1], float(entry[2])))
    return tuple(parsed)


def _parse_moving(reader: _Reader, objects: tuple[ObjectSpec, ...]) -> dict[str, str]:
    """What scene motion may move; a drawer's joint would be torn along, so drawers cannot be named."""
    content = reader.get("moving", dict, "a mapping with object and, if there is one, target", {})
    if not content:
        return {}
    entry = _Reader(content, reader.source, "moving")
    found = {"object": entry.get("object", str, "an object name"), "target": entry.get("target", str, "a name", "")}
    entry.finish()
    allowed = [item.name for item in objects if not item.articulated]
    for role, name in found.items():
        if name and name not in allowed:
            raise TaskError(f"{reader.source}: key 'moving.{role}' names object '{name}'. {closest(name, allowed)}")
    return found


def _parse_milestones(reader: _Reader) -> dict[str, str]:
    value = reader.get("milestones", dict, "a mapping of name to predicate", {})
    for name, text in value.items():
        if not isinstance(text, str):
            raise reader.fail(f"milestones.{name}", "a predicate such as 'grasped(cube)'", text)
    return {str(name): text for name, text in value.items()}


def _parse_behaviors(reader: _Reader) -> dict[str, dict[str, str]]:
    expected = "a mapping of choice to labels, such as {side: {left: 'left_of(tcp, post)', right: ...}}"
    value = reader.get("behaviors", dict, expected, {})
    for choice, labels in value.items():
        if not isinstance(labels, dict) or len(labels) < 2:
            raise reader.fail(f"behaviors.{choice}", "a mapping of at least two labels to predicates", labels)
        for label, text in labels.items():
            if not isinstance(text, str):
                raise reader.fail(f"behaviors.{choice}.{label}", "a predicate such as 'left_of(tcp, post)'", text)
    return {str(choice): {str(label): text for label, text in labels.items()} for choice, labels in value.items()}


def _parse_plan(reader: _Reader, names: list[str]) -> tuple[SkillStep, ...]:
    steps = []
    for index, entry in enumerate(reader.get("plan", list, "a list of skills", [])):
        step = _Reader(entry, reader.source, f"plan[{index}]")
        skill = step.get("skill", str, "a skill name")
        if skill not in SKILLS:
            raise TaskError(f"{reader.source}: key 'plan[{index}].skill' is '{skill}'. {closest(skill, SKILLS)}")
        arguments: dict[str, Any] = {}
        for key in SKILLS[skill]:
            if key.endswith("_m"):
                arguments[key] = step.get(key, float, "a length in metres")
                continue
            arguments[key] = step.get(key, str, "an object name")
            if arguments[key] not in names:
                raise TaskError(
                    f"{reader.source}: key 'plan[{index}].{key}' names object '{arguments[key]}'. "
                    f"{closest(arguments[key], names)}"
                )
        step.finish()
        steps.append(SkillStep(skill=skill, arguments=arguments))
    return tuple(steps)


@functools.cache
def _shipped_tasks() -> dict[str, str]:
    folder = resources.files("simtoreal.configs.tasks")
    return {
        entry.name.removesuffix(".yaml"): entry.read_text()
        for entry in sorted(folder.iterdir(), key=lambda item: item.name)
        if entry.name.endswith(".yaml")
    }


def list_tasks() -> list[str]:
    """Names of the tasks shipped with the package."""
    return sorted(_shipped_tasks())


def load_task(task: str | Path | TaskSpec) -> TaskSpec:
    """Return a task by name, or from a yaml file.

    Args:
        task: a shipped name such as ``"pick_place"``, a path that ends in ``.yaml``, or a specification.

    Raises:
        TaskError: unknown name (with the closest one), missing or unreadable file, or malformed yaml.
    """
    if isinstance(task, TaskSpec):
        return task
    if str(task).endswith((".yaml", ".yml")):
        path = Path(task)
        if not path.is_file():
            raise TaskError(f"task file '{path}' does not exist")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"cannot read task file '{path}': {error}. Save it as UTF-8 text.") from error
        return parse_task_text(text, str(path))
    shipped = _shipped_tasks()
    if task not in shipped:
        guess = difflib.get_close_matches(str(task), shipped, n=1)
        raise TaskError(
            f"unknown task '{task}'. {closest(str(task), shipped)}"
            + ("" if guess else " A path that ends in .yaml loads a task of your own.")
        )
    return parse_task_text(shipped[str(task)], f"configs/tasks/{task}.yaml")


def parse_task_text(text: str, source: str) -> TaskSpec:
    """Parse the yaml text of a task that is to be simulated; see :func:`parse_task`.

    Raises:
        TaskError: also for a key that is given twice, and for a scene that cannot be simulated.
    """
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        raise TaskError(f"{source}: not valid yaml: {error}") from error
    task = parse_task(content, source)
    for item in task.objects:
        if item.fixed and "mass_kg" in content["objects"][item.name]:
            raise TaskError(
                f"{source}: key 'objects.{item.name}.mass_kg' is for what can be moved; leave it out for a {item.shape}"
            )
    _require_possible(task)
    return task


def _require_possible(task: TaskSpec) -> None:
    """Refuse what the simulation could not do; a stored dataset, which may be of another world, is not held to it."""

    def within(key: str, values: Iterable[float], low: float, high: float, unit: str) -> None:
        for value in values:
            if not low <= value <= high:
                raise TaskError(f"{task.source}: key '{key}' is {value:g}; expected {low:g} to {high:g}{unit}")

    if not _NAME.fullmatch(task.name):
        raise TaskError(f"{task.source}: key 'name' is '{task.name}'; expected letters, digits, and _ . - inside")
    for item in task.objects:
        within(f"objects.{item.name}.size_m", item.size_m, *SIZE_M, " m")
        if item.shape == "drawer":
            for value, smallest, dimension in zip(
                item.size_m, DRAWER_SMALLEST_M, SHAPE_DIMENSIONS["drawer"], strict=True
            ):
                what = f" m for the {dimension} of a drawer"
                within(f"objects.{item.name}.size_m", [value], smallest, SIZE_M[1], what)
        within(f"objects.{item.name}.mass_kg", [item.mass_kg], *MASS_KG, " kg")
        within(f"objects.{item.name}.friction", [item.friction], *FRICTION, "")
        initial = task.initial[item.name]
        if initial.opening_m != (0.0, 0.0) and not item.articulated:
            raise TaskError(
                f"{task.source}: key 'initial.{item.name}.opening_m' is for drawers; leave it out for a {item.shape}"
            )
        for axis, values in enumerate((initial.x_m, initial.y_m)):
            middle, half = TABLE_CENTER_M[axis], TABLE_HALF_M[axis]
            within(f"initial.{item.name}.{'xy'[axis]}_m", values, middle - half, middle + half, " m, the table")
        within(f"initial.{item.name}.yaw_deg", initial.yaw_deg, *YAW_DEG, " degrees")
        lowest = item.half_height_m
        what = f" m, the origin of a {item.shape} of this size on the table or above it"
        within(f"initial.{item.name}.z_m", initial.z_m or (), lowest, HIGHEST_M, what)
    if task.horizon < SUCCESS_HOLD_STEPS:
        raise TaskError(
            f"{task.source}: key 'horizon' is {task.horizon}; expected {SUCCESS_HOLD_STEPS} control steps or more, for "
            "so long the goal has to hold"
        )
    if task.moving_object and task.moving_object == task.moving_target:
        raise TaskError(
            f"{task.source}: key 'moving' names '{task.moving_object}' twice; expected another target, or none"
        )
    for first, second, distance in task.min_distances:
        if first == second:
            raise TaskError(f"{task.source}: key 'min_distances' names '{first}' twice; expected two objects")
        if distance < 0:
            raise TaskError(
                f"{task.source}: key 'min_distances' is {distance:g} m for '{first}' and '{second}'; expected 0 or more"
            )
    for key, text in _predicates(task):
        require_sense(text, f"{task.source}: {key}")
    _require_apart(task)
    require_executable(task)


def _predicates(task: TaskSpec) -> Iterable[tuple[str, str]]:
    """Key and text of every predicate of the task."""
    yield "goal", task.goal
    if task.failure:
        yield "failure", task.failure
    yield from ((f"milestones.{name}", text) for name, text in task.milestones.items())
    for choice, labels in task.behaviors.items():
        yield from ((f"behaviors.{choice}.{label}", text) for label, text in labels.items())


def require_executable(task: TaskSpec) -> None:
    """Refuse a plan that the scripted expert cannot follow.

    Raises:
        TaskError: a skill is given an object of a shape or width that it cannot deal with, or that no step before it
            picks.
    """
    picked: set[str] = set()
    for index, step in enumerate(task.plan):
        where = f"{task.source}: key 'plan[{index}]"
        named = {key: value for key, value in step.arguments.items() if isinstance(value, str)}
        for key, name in named.items():
            shape, shapes = task.object(name).shape, SKILL_SHAPES.get((step.skill, key))
            if shapes is not None and shape not in shapes:
                raise TaskError(
                    f"{where}.{key}' names '{name}', a {shape}; '{step.skill}' needs a {' or '.join(shapes)} there"
                )
        if len(set(named.values())) < len(named):
            raise TaskError(f"{where}' names '{next(iter(named.values()))}' twice; expected two objects")
        if "height_m" in step.arguments and not 0 < step.arguments["height_m"] <= HIGHEST_M:
            given = step.arguments["height_m"]
            raise TaskError(f"{where}.height_m' is {given:g}; expected more than 0 and at most {HIGHEST_M:g} m")
        if step.skill == "weave" and not any(item.shape == "plate" for item in task.objects):
            raise TaskError(f"{where}' weaves through rows of plates, and the task has none; add one, or use 'reach'")
        if step.skill == "pick":
            # The narrower side of a box; the diameter of what is round.
            name = named["object"]
            width = 2 * task.object(name).half_extent_m
            if width >= GRIPPER_OPENING_M:
                raise TaskError(
                    f"{where}.object' names '{name}', which is {width:g} m wide at its narrowest; the gripper opens "
                    f"{GRIPPER_OPENING_M:g} m. Make 'objects.{name}.size_m' smaller, or use 'push'"
                )
            picked.add(named["object"])
        elif step.skill in CARRYING_SKILLS and named["object"] not in picked:
            raise TaskError(
                f"{where}' needs '{named['object']}' in the gripper; add {{skill: pick, object: {named['object']}}} "
                "before it"
            )


def _require_apart(task: TaskSpec) -> None:
    """Refuse two objects without a hole that overlap on the table wherever they are put."""
    solid = [
        item
        for item in task.objects
        if item.shape in ("box", "cylinder", "sphere", "plate") and task.initial[item.name].z_m is None
    ]
    for first, second in itertools.combinations(solid, 2):
        mine, other = task.initial[first.name], task.initial[second.name]
        furthest = math.hypot(
            *(max(a[1] - b[0], b[1] - a[0]) for a, b in ((mine.x_m, other.x_m), (mine.y_m, other.y_m)))
        )
        if furthest < 0.5 * (first.half_extent_m + second.half_extent_m):
            raise TaskError(
                f"{task.source}: key 'initial': '{first.name}' and '{second.name}' are put inside each other, at most "
                f"{furthest:g} m apart. Move one, or give it a height with z_m."
            )

"""Task specifications: a task is data. :mod:`simtoreal.envs.task_file` reads it from yaml."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simtoreal.envs.errors import TaskError, closest
from simtoreal.envs.predicates import Predicate, parse_predicate

FREE_SHAPES = ("box", "cylinder", "sphere", "frame")
FIXED_SHAPES = ("plate", "region", "point", "socket", "drawer")
SHAPE_DIMENSIONS = {
    "box": ("half_x", "half_y", "half_z"),
    "cylinder": ("radius", "half_height"),
    "sphere": ("radius",),
    "frame": ("hole_half_width", "wall", "half_height"),
    "plate": ("radius", "half_height"),
    "region": ("radius",),
    "point": ("radius",),
    "socket": ("hole_half_width", "wall", "half_height"),
    "drawer": ("half_depth", "half_width", "half_height"),
}
COLORS = {
    "red": (0.85, 0.12, 0.12), "green": (0.15, 0.65, 0.2), "blue": (0.15, 0.3, 0.85),
    "yellow": (0.95, 0.8, 0.1), "purple": (0.55, 0.2, 0.7), "orange": (0.95, 0.5, 0.1),
    "white": (0.92, 0.92, 0.92), "gray": (0.5, 0.5, 0.52), "brown": (0.55, 0.36, 0.2),
}  # fmt: skip
# Control steps in a row in which the goal holds before an episode ends in success.
SUCCESS_HOLD_STEPS = 5
# skill -> its arguments; those that end in _m are lengths, the others objects.
SKILLS: dict[str, tuple[str, ...]] = {
    "reach": ("point",),
    "pick": ("object",),
    "lift": ("object", "height_m"),
    "place": ("object", "onto"),
    "push": ("object", "to"),
    "insert": ("object", "into"),
    "open": ("drawer",),
    "close": ("drawer",),
    "weave": ("finish",),
    "align": ("object", "to"),
}
_GRASPABLE = ("box", "cylinder", "sphere")
# (skill, argument) -> shapes that the skill can deal with; any, if it is not here.
SKILL_SHAPES: dict[tuple[str, str], tuple[str, ...]] = {
    ("pick", "object"): _GRASPABLE,
    ("lift", "object"): _GRASPABLE,
    ("place", "object"): _GRASPABLE,
    ("place", "onto"): tuple(shape for shape in SHAPE_DIMENSIONS if shape != "drawer"),
    ("push", "object"): FREE_SHAPES,
    ("insert", "object"): _GRASPABLE,
    ("insert", "into"): ("socket",),
    ("open", "drawer"): ("drawer",),
    ("close", "drawer"): ("drawer",),
    ("align", "object"): ("frame",),
}
# Skills that need their object in the gripper, or go back to the step that picks it when it is lost.
CARRYING_SKILLS = ("lift", "place", "insert")


@dataclass(frozen=True, kw_only=True)
class ObjectSpec:
    """A thing on the table.

    Attributes:
        name: identifier used in predicates and plans.
        shape: one of ``FREE_SHAPES`` (moved by forces) or ``FIXED_SHAPES``.
        size_m: dimensions in metres, see ``SHAPE_DIMENSIONS``.
        color: name of ``COLORS``.
        mass_kg: mass of a free object.
        friction: sliding friction coefficient. The rougher of two surfaces decides about a contact, and the table has
            1.0, the fingers 1.5: smaller values count only where two objects touch.
    """

    name: str
    shape: str
    size_m: tuple[float, ...]
    color: str
    mass_kg: float = 0.05
    friction: float = 1.0

    @property
    def fixed(self) -> bool:
        """Whether the object stays where it was put."""
        return self.shape in FIXED_SHAPES

    @property
    def articulated(self) -> bool:
        """Whether the object has a joint of its own."""
        return self.shape == "drawer"

    @property
    def half_height_m(self) -> float:
        """Distance from the body origin down to its base, 0 for shapes whose origin is their base."""
        if self.shape in ("box", "cylinder", "frame"):
            return self.size_m[-1]
        return self.size_m[0] if self.shape == "sphere" else 0.0

    @property
    def top_m(self) -> float:
        """Height of the supporting surface above the body origin."""
        if self.shape == "plate":
            return 2 * self.size_m[1]
        if self.shape in ("socket", "drawer"):
            return 2 * self.size_m[2]
        return 0.0 if self.shape in ("region", "point") else self.half_height_m

    @property
    def height_m(self) -> float:
        """Height of its highest point when it stands on the table."""
        return self.top_m if self.fixed else 2 * self.half_height_m

    @property
    def half_extent_m(self) -> float:
        """Horizontal half extent of the supporting surface; of a socket or a frame, of its hole."""
        return min(self.size_m[:2]) if self.shape == "box" else self.size_m[0]

    @property
    def outer_radius_m(self) -> float:
        """How far it reaches from its middle on the table, for clearances; of a drawer, its cabinet.

        A box counts half its longer side, with which MOVE was measured: the corners of two cubes of up to 4.5 cm stick
        out by less than what moving things keep free.
        """
        if self.shape in ("socket", "frame"):
            return math.sqrt(2) * (self.size_m[0] + 2 * self.size_m[1])
        if self.shape == "drawer":
            return math.hypot(*self.size_m[:2])
        return max(self.size_m[:2]) if self.shape == "box" else self.size_m[0]


@dataclass(frozen=True, kw_only=True)
class InitialSpec:
    """Uniform initial distribution of one object, in the robot base frame.

    Attributes:
        x_m, y_m: range of the position.
        z_m: range of the height of the body origin; None rests the object on the table.
        yaw_deg: range of the rotation about z.
        opening_m: range of a drawer's opening.
    """

    x_m: tuple[float, float]
    y_m: tuple[float, float]
    z_m: tuple[float, float] | None = None
    yaw_deg: tuple[float, float] = (0.0, 0.0)
    opening_m: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class SkillStep:
    """One step of the plan that the scripted expert executes: a skill of ``SKILLS`` and its arguments."""

    skill: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A validated task.

    Attributes:
        name: identifier, also of its Gymnasium id.
        description: one sentence.
        horizon: control steps after which an episode is truncated.
        instructions: language templates; one is drawn per episode.
        objects: in the order of ``object_state``.
        initial: object name -> initial distribution.
        min_distances: ``(a, b, metres)`` enforced between initial horizontal positions.
        goal: predicate text; success is the goal holding for five control steps.
        milestones: name -> predicate text, in the order they are usually reached.
        plan: skills for the scripted expert.
        moving_object: object that scene motion may move until it is touched; empty for none.
        moving_target: object that scene motion may move while ``moving_object`` is touched; empty for none.
        failure: predicate text; as soon as it holds the episode ends as a failure. Empty: it never does.
        behaviors: choice -> label -> predicate text. The label of a choice is the first whose predicate held in an
            episode, e.g. on which side an obstacle was passed; a behaviour is one label per choice.
        source: file it was read from, for error messages.
    """

    name: str
    description: str
    horizon: int
    instructions: tuple[str, ...]
    objects: tuple[ObjectSpec, ...]
    initial: dict[str, InitialSpec]
    goal: str
    milestones: dict[str, str]
    plan: tuple[SkillStep, ...]
    min_distances: tuple[tuple[str, str, float], ...] = ()
    moving_object: str = ""
    moving_target: str = ""
    failure: str = ""
    behaviors: dict[str, dict[str, str]] = field(default_factory=dict)
    source: str = field(default="", compare=False)

    @functools.cached_property
    def object_state_names(self) -> tuple[str, ...]:
        """Names of the ``object_state`` observation: position, quaternion and any joint of every object."""
        names: list[str] = []
        for item in self.objects:
            names += [f"{item.name}_{axis}" for axis in ("x", "y", "z", "qw", "qx", "qy", "qz")]
            names += [f"{item.name}_opening"] if item.articulated else []
        return tuple(names)

    @functools.cached_property
    def goal_predicate(self) -> Predicate:
        """Compiled goal."""
        return parse_predicate(self.goal, self.objects, where=f"{self.source}: goal")

    @functools.cached_property
    def failure_predicate(self) -> Predicate | None:
        """Compiled failure, None without one."""
        if not self.failure:
            return None
        return parse_predicate(self.failure, self.objects, where=f"{self.source}: failure")

    @functools.cached_property
    def behavior_predicates(self) -> dict[str, dict[str, Predicate]]:
        """Compiled behaviours."""
        return {
            choice: {
                label: parse_predicate(
                    text, self.objects, where=f"{self.source}: behaviors.{choice}.{label}", poses_only=True
                )
                for label, text in labels.items()
            }
            for choice, labels in self.behaviors.items()
        }

    @functools.cached_property
    def milestone_predicates(self) -> dict[str, Predicate]:
        """Compiled milestones."""
        return {
            name: parse_predicate(text, self.objects, where=f"{self.source}: milestones.{name}")
            for name, text in self.milestones.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """Only the fields: what is compiled of them cannot be sent to another process, and is compiled again there."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def object(self, name: str) -> ObjectSpec:
        """Return the object called ``name``.

        Raises:
            TaskError: there is none.
        """
        for item in self.objects:
            if item.name == name:
                return item
        raise TaskError(
            f"task '{self.name}' has no object '{name}'. {closest(name, [item.name for item in self.objects])}"
        )

    def _moving(self) -> dict[str, str]:
        named = {"object": self.moving_object, "target": self.moving_target}
        return {role: name for role, name in named.items() if name}

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary in the layout of the yaml file; :func:`~simtoreal.envs.task_file.parse_task` inverts it."""
        objects = {}
        for item in self.objects:
            entry: dict[str, Any] = {"shape": item.shape, "size_m": list(item.size_m), "color": item.color}
            if not item.fixed:
                entry |= {"mass_kg": item.mass_kg}
            objects[item.name] = entry | {"friction": item.friction}
        initial = {
            name: {key: list(value) for key, value in dataclasses.asdict(spec).items() if value is not None}
            for name, spec in self.initial.items()
        }
        return {
            "name": self.name,
            "description": self.description,
            "horizon": self.horizon,
            "instructions": list(self.instructions),
            "objects": objects,
            "initial": initial,
            "min_distances": [list(entry) for entry in self.min_distances],
            "goal": self.goal,
            **({"failure": self.failure} if self.failure else {}),
            "milestones": dict(self.milestones),
            **({"behaviors": {key: dict(value) for key, value in self.behaviors.items()}} if self.behaviors else {}),
            "plan": [{"skill": step.skill, **step.arguments} for step in self.plan],
            **({"moving": moving} if (moving := self._moving()) else {}),
        }


@dataclass(frozen=True)
class InitialCondition:
    """What one seed means: object poses, drawer openings and the instruction."""

    positions: np.ndarray
    quaternions: np.ndarray
    openings: np.ndarray
    instruction: str


def sample_initial_condition(task: TaskSpec, rng: np.random.Generator, *, attempts: int = 1000) -> InitialCondition:
    """Draw initial object poses that keep the task's minimum distances.

    Returns:
        positions ``(objects, 3)`` metres, quaternions ``(objects, 4)`` wxyz, openings ``(objects,)`` metres.

    Raises:
        TaskError: no draw satisfies the distances, so the specification is contradictory.
    """
    names = [item.name for item in task.objects]
    pairs = [(names.index(a), names.index(b), distance) for a, b, distance in task.min_distances]
    low = np.array([[task.initial[n].x_m[0], task.initial[n].y_m[0]] for n in names]).reshape(-1, 2)
    high = np.array([[task.initial[n].x_m[1], task.initial[n].y_m[1]] for n in names]).reshape(-1, 2)
    for _ in range(attempts):
        xy = rng.uniform(low, high)
        if all(np.hypot(*(xy[a] - xy[b])) >= distance for a, b, distance in pairs):
            break
    else:
        raise TaskError(
            f"{task.source or task.name}: no initial placement satisfies min_distances after {attempts} draws. "
            "Widen 'initial' or lower 'min_distances'."
        )
    positions, quaternions, openings = np.zeros((len(names), 3)), np.zeros((len(names), 4)), np.zeros(len(names))
    for index, item in enumerate(task.objects):
        spec = task.initial[item.name]
        height = item.half_height_m if spec.z_m is None else rng.uniform(*spec.z_m)
        positions[index] = (*xy[index], height)
        half_turn = np.deg2rad(rng.uniform(*spec.yaw_deg)) / 2
        quaternions[index] = (np.cos(half_turn), 0.0, 0.0, np.sin(half_turn))
        openings[index] = rng.uniform(*spec.opening_m)
    instruction = task.instructions[int(rng.integers(len(task.instructions)))]
    return InitialCondition(positions, quaternions, openings, instruction)

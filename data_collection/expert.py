"""Scripted expert: executes the skill plan of a task as a feedback policy.

At every control step the goal of the current skill is computed anew from the live poses, so the expert
follows objects that move, returns to a dropped object and recovers from disturbances. It sees the scene
truth (``object_state``) and ``proprio`` only, so the same code drives simulation and the ROS 2 twin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from simtoreal.data_collection.expert_align import align
from simtoreal.data_collection.expert_avoid import weave
from simtoreal.data_collection.expert_drawer import close_drawer, open_drawer
from simtoreal.data_collection.expert_scene import Goal, Memory, Scene, above, nearest, ramp, wrap
from simtoreal.data_collection.operator_style import AXES, OperatorStyle
from simtoreal.envs import rotation
from simtoreal.envs.action import action_towards, integrate_action
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.rollout import Observation
from simtoreal.envs.scene_motion import MARGIN_M, free_gap
from simtoreal.envs.task import ObjectSpec, TaskSpec
from simtoreal.envs.task_file import require_executable

CLOSE_STEPS = 4
GIVE_UP_STEPS = 14
CLEARANCE_M = 0.06
FINGER_HALF_M = 0.014
# The hand waits for an arm that is this far behind its target; a gate would stop an arm that falls further behind. An
# ideal arm is at most 0.045 m behind, one with the randomisation 'standard' 0.087 m.
MAX_LEAD_M = 0.09
# An axis of a route is done when the commanded target is this close.
ROUTE_TOLERANCE_M = 0.004


class ScriptedExpert:
    """Actor that solves a task by its plan, seeing the scene truth.

    Args:
        task: the task, with a plan.
        embodiment: must use the action mode ``ee_delta``.
        style: how to move.
        seed: combined with the seed of each episode for the style's noise.

    Raises:
        ConfigError: the task has no plan, or the action mode is not ``ee_delta``.
        TaskError: see :func:`~simtoreal.envs.task_file.require_executable`.
    """

    observation_steps = 1
    execute_steps = 1
    ensembling: float | None = None

    def __init__(
        self, task: TaskSpec, embodiment: Embodiment, *, style: OperatorStyle | None = None, seed: int = 0
    ) -> None:
        if not task.plan:
            raise ConfigError(f"task '{task.name}' has no plan; add 'plan' to {task.source} to use the expert")
        require_executable(task)
        if embodiment.action.mode != "ee_delta":
            raise ConfigError(f"the expert needs action mode 'ee_delta', not '{embodiment.action.mode}'")
        self.task, self.embodiment, self.style, self.seed = task, embodiment, style or OperatorStyle(), seed
        self.memories: dict[int, Memory] = {}

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """Begin new episodes in ``slots``."""
        for slot, seed in zip(slots, seeds, strict=True):
            self.memories[int(slot)] = Memory(np.random.default_rng([self.seed, seed]), number=seed)

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """Return actions ``(len(slots), 1, 7)``.

        Raises:
            ConfigError: the observation lacks ``object_state``.
        """
        if "object_state" not in observation:
            raise ConfigError("the scripted expert needs 'object_state' (scene truth) in the observation")
        proprio, state = observation["proprio"][:, -1].astype(float), observation["object_state"][:, -1].astype(float)
        targets, goals, speeds = np.zeros((len(slots), 10)), np.zeros((len(slots), 10)), np.ones(len(slots))
        follow = np.zeros((len(slots), 2))
        memories = [self.memories[int(slot)] for slot in slots]
        for row, memory in enumerate(memories):
            scene = self._scene(proprio[row], state[row])
            if memory.quaternion is None:
                memory.quaternion = rotation.from_6d(proprio[row, 3:9])
            follow[row] = self._scene_displacement(scene, memory)
            goal = self._goal(scene, memory)
            turn = np.array([0.0, math.cos(goal.yaw / 2), math.sin(goal.yaw / 2), 0.0])
            if np.linalg.norm(scene.target - scene.tcp) > MAX_LEAD_M:
                goal.position = scene.target.copy()
            targets[row] = [*scene.target, *rotation.to_6d(memory.quaternion), 1.0]
            goals[row] = [*goal.position, *rotation.to_6d(turn), 0.0 if goal.closed else 1.0]
            speeds[row] = goal.speed * self.style.speed
        return self._actions(targets, goals, speeds, follow, memories)[:, None]

    def _scene_displacement(self, scene: Scene, memory: Memory) -> np.ndarray:
        """How far ``(2,)`` metres the scene moved by itself since the last step; the hand goes along with it.

        Following without this lags behind, which a policy would learn as a distance to keep.
        """
        name, before = memory.moving, memory.seen
        after = {item: pose[0].copy() for item, pose in scene.poses.items()}
        memory.seen, memory.moving = after, self._moving(scene, memory)
        return (after[name] - before[name])[:2] if name else np.zeros(2)

    def _moving(self, scene: Scene, memory: Memory) -> str:
        """The object that may move by itself until the next step, or an empty name.

        Within the margin of :class:`~simtoreal.envs.scene_motion.SceneMover` nothing moves unless it is pushed.
        """
        task = self.task
        if not task.moving_object or memory.closing or memory.releasing:
            return ""
        item, point, half_width, half_height = task.object(task.moving_object), scene.tcp, 0.0, 0.0
        if item.name in memory.held:
            if not task.moving_target:
                return ""
            point, half_width, half_height = scene.poses[item.name][0], item.outer_radius_m, item.half_height_m
            item = task.object(task.moving_target)
        gap = free_gap(point[None], half_width, half_height, scene.poses[item.name][0][None], item)[0]
        return item.name if gap > MARGIN_M else ""

    def _actions(
        self, targets: np.ndarray, goals: np.ndarray, speeds: np.ndarray, follow: np.ndarray, memories: list[Memory]
    ) -> np.ndarray:
        limits = np.asarray(self.embodiment.action.limits)
        distance = np.linalg.norm(goals[:, :3] - targets[:, :3], axis=-1)
        step = np.minimum(self.style.gain * distance, speeds * limits[0])
        share = step / np.maximum(distance, 1e-9)
        goals[:, :3] = targets[:, :3] + share[:, None] * (goals[:, :3] - targets[:, :3])
        goals[:, :2] += follow
        actions = action_towards(targets, goals, self.embodiment)
        if self.style.noise:
            noise = np.stack([memory.rng.normal(0.0, self.style.noise, 3) for memory in memories])
            actions[:, :3] = np.clip(actions[:, :3] + noise, -1.0, 1.0)
        after = rotation.from_6d(integrate_action(targets, actions, self.embodiment)[:, 3:9])
        for memory, quaternion in zip(memories, after, strict=True):
            memory.quaternion = quaternion
        return actions

    def _scene(self, proprio: np.ndarray, state: np.ndarray) -> Scene:
        poses, openings, offset = {}, {}, 0
        for item in self.task.objects:
            w, x, y, z = state[offset + 3 : offset + 7]
            poses[item.name] = state[offset : offset + 3], math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
            offset += 7
            if item.articulated:
                openings[item.name] = float(state[offset])
                offset += 1
        yaw = math.atan2(proprio[4], proprio[3])
        return Scene(proprio[:3], yaw, proprio[9:12], float(proprio[12]), poses, openings)

    # The plan -----------------------------------------------------------------------------------------------

    def _goal(self, scene: Scene, memory: Memory) -> Goal:
        while memory.plan_step < len(self.task.plan):
            step = self.task.plan[memory.plan_step]
            goal = getattr(self, f"_{step.skill}")(scene, memory, **self._resolve(step.arguments))
            if goal is not None:
                return goal
            memory.plan_step += 1
            memory.closing = memory.releasing = 0
            memory.retreating = False
        return Goal(scene.target, scene.tcp_yaw, bool(memory.held), 1.0)

    def _resolve(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {key: self.task.object(value) if isinstance(value, str) else value for key, value in arguments.items()}

    def _back_to_pick(self, scene: Scene, memory: Memory, item: ObjectSpec) -> Goal:
        """The object was lost: return to the step that picked it."""
        for index, step in enumerate(self.task.plan[: memory.plan_step]):
            if step.skill == "pick" and step.arguments["object"] == item.name:
                memory.plan_step = index
        memory.held.discard(item.name)
        memory.closing = memory.releasing = 0
        return self._goal(scene, memory)

    # Skills: return the goal of this step, or None when the skill is done --------------------------------------

    def _reach(self, scene: Scene, memory: Memory, point: ObjectSpec) -> Goal:
        goal = scene.poses[point.name][0].copy()
        route = [AXES.index(axis) for axis in self.style.route]
        ahead = [index for index, axis in enumerate(route) if abs(goal[axis] - scene.target[axis]) > ROUTE_TOLERANCE_M]
        if ahead:
            later = route[ahead[0] + 1 :]
            goal[later] = scene.target[later]
        return Goal(goal, nearest(0.0, scene.tcp_yaw, math.pi), True)

    def _grasp_point(self, scene: Scene, item: ObjectSpec) -> np.ndarray:
        """Cubes are held in the middle, tall things near the top so that the hand stays clear."""
        position = scene.poses[item.name][0].copy()
        position[2] += max(0.0, item.half_height_m - 0.025)
        return position

    def _grasp_yaw(self, scene: Scene, item: ObjectSpec) -> float:
        """The nearest yaw at which the fingers, left and right of the gripper's x axis, close across two faces."""
        yaw, period = scene.poses[item.name][1], math.pi / 2
        if item.shape == "box" and 2 * max(item.size_m[:2]) > self.embodiment.gripper_max_opening_m:
            # It fits one way only: the gripper's x axis along its longer side.
            yaw, period = (yaw if item.size_m[0] > item.size_m[1] else wrap(yaw + math.pi / 2)), math.pi
        return nearest(yaw, scene.tcp_yaw, period)

    def _holds(self, scene: Scene, item: ObjectSpec) -> bool:
        width = 2 * item.half_extent_m
        wide_enough = scene.opening * self.embodiment.gripper_max_opening_m > width - 0.008
        return bool(wide_enough and np.linalg.norm(scene.tcp - self._grasp_point(scene, item)) < 0.03)

    def _pick(self, scene: Scene, memory: Memory, object: ObjectSpec) -> Goal | None:
        point = self._grasp_point(scene, object)
        yaw = self._grasp_yaw(scene, object)
        error = float(np.hypot(*(scene.tcp - point)[:2]))
        if memory.closing:
            memory.closing += 1
            if memory.closing > CLOSE_STEPS and self._holds(scene, object):
                memory.held.add(object.name)
                return None
            if memory.closing < GIVE_UP_STEPS:
                return Goal(np.array([*point[:2], scene.target[2]]), yaw, True, 0.5)
            memory.closing = 0
        aligned = abs(wrap(yaw - scene.tcp_yaw)) < 0.1
        if error < 0.006 and aligned and abs(scene.tcp[2] - point[2]) < 0.008:
            memory.closing = 1
            return Goal(point, yaw, True, 0.5)
        height = self.style.approach_height_m * ramp(error if aligned else max(error, 0.04), 0.006, 0.035)
        detour = np.array([*self.style.approach_offset_m, 0.0]) * ramp(scene.tcp[2] - point[2], 0.03, 0.12)
        return Goal(above(point + detour, height), yaw, False)

    def _lift(self, scene: Scene, memory: Memory, object: ObjectSpec, height_m: float) -> Goal:
        if not self._holds(scene, object):
            return self._back_to_pick(scene, memory, object)
        goal = np.array([*scene.target[:2], height_m + object.half_height_m])
        return Goal(goal, scene.tcp_yaw, True)

    def _place(
        self, scene: Scene, memory: Memory, object: ObjectSpec, onto: ObjectSpec, tolerance: float = 0.008
    ) -> Goal | None:
        support, _ = scene.poses[onto.name]
        surface = support[2] + onto.top_m
        return self._put_down(scene, memory, object, support[:2], surface, None, tolerance, surface)

    def _insert(self, scene: Scene, memory: Memory, object: ObjectSpec, into: ObjectSpec) -> Goal | None:
        hole, yaw = scene.poses[into.name]
        rim = hole[2] + 2 * into.size_m[2]
        # Turning the gripper turns the peg with it: aim for the gripper yaw at which the faces line up.
        turn = nearest(yaw - scene.poses[object.name][1], 0.0, math.pi / 2)
        return self._put_down(scene, memory, object, hole[:2], hole[2] + 0.004, scene.tcp_yaw + turn, 0.0025, rim)

    def _put_down(
        self,
        scene: Scene,
        memory: Memory,
        item: ObjectSpec,
        place: np.ndarray,
        floor: float,
        yaw: float | None,
        tolerance: float,
        rim: float,
    ) -> Goal | None:
        """Carry the held object over ``place``, lower it to ``floor`` (m), let go and retreat.

        ``rim`` is the height the object must clear until it is within ``tolerance`` of the place.
        """
        position, _ = scene.poses[item.name]
        base = position[2] - item.half_height_m
        offset = place - position[:2]
        error = float(np.hypot(*offset))
        if memory.releasing:
            memory.releasing += 1
            memory.held.discard(item.name)
            if memory.releasing < 4:
                return Goal(scene.target.copy(), scene.tcp_yaw, False)
            if scene.tcp[2] > position[2] + item.half_height_m + CLEARANCE_M:
                return None if error < 0.05 else self._back_to_pick(scene, memory, item)
            return Goal(above(scene.target, 0.05), scene.tcp_yaw, False)
        if not self._holds(scene, item):
            return self._back_to_pick(scene, memory, item)
        turn = 0.0 if yaw is None else wrap(yaw - scene.tcp_yaw)
        inside = base < rim - 0.003 and error < 0.01
        if (error < tolerance or inside) and base < floor + 0.005:
            memory.releasing = 1
            return Goal(scene.target.copy(), scene.tcp_yaw, False)
        aligned = abs(turn) < 0.06
        apart = max(error, 0.0 if aligned or inside else 0.05)
        height = floor if inside else rim + CLEARANCE_M * ramp(apart, tolerance, tolerance + 0.03)
        if not inside and error < tolerance and aligned:
            height = floor
        # Where the hand must be for the object to be there; absolute, so that latency cannot wind it up.
        goal = np.array([*(scene.tcp[:2] + offset), scene.tcp[2] + height - base])
        if error < 0.008:
            # Close by, nudge the commanded target instead, which also removes the sag under the load.
            goal[:2] = scene.target[:2] + 0.3 * offset
        if base < rim + 0.6 * CLEARANCE_M and error > 0.05:
            goal[:2] = scene.tcp[:2] + 0.25 * offset
        slow = 0.25 if tolerance < 0.005 and error < 0.02 else (0.6 if error < 0.03 else 1.0)
        return Goal(goal, scene.tcp_yaw if yaw is None else scene.tcp_yaw + turn, True, slow)

    def _push(self, scene: Scene, memory: Memory, object: ObjectSpec, to: ObjectSpec) -> Goal | None:
        block, goal = scene.poses[object.name][0], scene.poses[to.name][0]
        offset = goal[:2] - block[:2]
        distance = float(np.hypot(*offset))
        if distance < 0.012:
            memory.retreating = True
        if memory.retreating:
            return Goal(above(scene.target, 0.05), scene.tcp_yaw, True) if distance < 0.03 else self._again(memory)
        direction = offset / distance
        reach = object.half_extent_m * (abs(direction[0]) + abs(direction[1])) + FINGER_HALF_M
        yaw = nearest(math.atan2(direction[1], direction[0]), scene.tcp_yaw, math.pi / 2)
        relative = scene.tcp[:2] - block[:2]
        along = float(relative @ direction)
        across = float(abs(relative[0] * direction[1] - relative[1] * direction[0]))
        height = max(0.02, block[2] - 0.005)
        behind = block[:2] - direction * (reach + 0.02)
        if along > -reach + 0.015 or across > 0.02:
            # Not behind the block: go around above it.
            start = block[:2] - direction * (reach + 0.025)
            apart = float(np.hypot(*(scene.tcp[:2] - start)))
            return Goal(np.array([*start, height + 0.08 * ramp(apart, 0.01, 0.03)]), yaw, True)
        if scene.tcp[2] > height + 0.012:
            return Goal(np.array([*behind, height]), yaw, True)
        # Lead the contact point by what remains, at most 2.5 cm, steering along the line to the goal.
        lead = block[:2] - direction * (reach - min(distance, 0.03))
        return Goal(np.array([*lead, height]), yaw, True, 0.35)

    def _weave(self, scene: Scene, memory: Memory, finish: ObjectSpec) -> Goal | None:
        return weave(self.task, scene, memory, finish)

    def _align(self, scene: Scene, memory: Memory, object: ObjectSpec, to: ObjectSpec) -> Goal | None:
        return align(scene, memory, object, to)

    def _again(self, memory: Memory) -> Goal | None:
        memory.retreating = False
        return None

    def _open(self, scene: Scene, memory: Memory, drawer: ObjectSpec) -> Goal | None:
        return open_drawer(scene, memory, drawer)

    def _close(self, scene: Scene, memory: Memory, drawer: ObjectSpec) -> Goal | None:
        return close_drawer(scene, memory, drawer)

"""The MuJoCo backend: many tabletop simulations stepped and drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from mujoco.batch import Batch, SimulationError

from simtoreal.envs import rotation
from simtoreal.envs.action import build_proprio, check_action, integrate_pose
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, TaskError
from simtoreal.envs.panda import FINGER_TRAVEL_M, panda_embodiment, pose_to_control
from simtoreal.envs.predicates import SceneView
from simtoreal.envs.randomization import (
    MAX_LATENCY_STEPS,
    START_HEIGHT_M,
    Randomization,
    load_randomization,
    sample_variation,
)
from simtoreal.envs.rendering import DRAWN_FIELDS, BatchRenderer
from simtoreal.envs.scene import TABLE_LOOKS, build_model, index_objects
from simtoreal.envs.scene_motion import SceneMotion, SceneMover, load_motion, put_planar
from simtoreal.envs.scene_state import object_state, view_scene
from simtoreal.envs.seeds import one_seed_each
from simtoreal.envs.task import SUCCESS_HOLD_STEPS, TaskSpec, sample_initial_condition
from simtoreal.envs.task_file import load_task
from simtoreal.envs.varied_models import VariedModels

HOME_NOISE_RAD = 0.02
# How long it takes to bring an arm to a start away from home, and how much of that its target moves; then it settles.
START_S, START_DRIVE_S = 1.3, 0.9
# Draws of an initial condition in which the goal must be false once.
MAX_DRAWS = 100
# Beyond any state the scenes can reach; MuJoCo itself only reacts at 1e10.
DIVERGED_STATE = 1e6
_STAGE_NONE, _STAGE_VEL, _STAGE_ACC = 0, int(mujoco.mjtStage.mjSTAGE_VEL), int(mujoco.mjtStage.mjSTAGE_ACC)


class TabletopVectorEnv(VectorEnv):  # type: ignore[misc]
    """N independent tabletop simulations behind the vector interface of Gymnasium.

    Observations: ``<camera>_image`` uint8 ``(N, H, W, 3)``, ``proprio`` float32 ``(N, 20)`` and, because this
    is a simulation, ``object_state`` float32 ``(N, D)`` (names in ``task.object_state_names``). Actions and
    info are described in docs/interface.md. The integer seed of a reset defines the initial condition
    completely, independently of the slot it runs in and of the other simulations.

    Attributes:
        images_wanted: see docs/interface.md; False saves the time of drawing what nobody looks at.

    Args:
        task: name, path or specification.
        num_envs: number of simulations.
        embodiment: default: the Panda with two cameras of ``image_size`` pixels.
        image_size: pixels, when no embodiment is given.
        render_profile: ``fast`` or ``high``, when no embodiment is given.
        cameras: camera names, when no embodiment is given.
        observe: ``"image"``, or ``"state"`` to leave the images out.
        randomization: name of ``RANDOMIZATIONS`` or ranges, drawn anew per reset.
        motion: name of ``SCENE_MOTIONS`` or settings: how objects and cameras move during an episode (MOVE). The
            initial condition of a seed is the same with and without it.
        autoreset_mode: ``DISABLED`` (reset with ``options={"reset_mask": ...}``) or ``NEXT_STEP``.
        threads: physics threads; 0 means one per CPU.
        record_state: put ``sim_state`` (the exact state, see :meth:`get_state`) into every info.

    Raises:
        ConfigError: no simulations, negative threads, an embodiment whose action mode is not ``ee_delta``, or images
            without cameras.
        ConfigError, TaskError: see :func:`load_task`, :func:`load_randomization`, :class:`SceneMover`.
        TaskError: an arm is to start anywhere above an object that reaches to the end of its workspace.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(
        self,
        task: str | TaskSpec,
        num_envs: int,
        *,
        embodiment: Embodiment | None = None,
        image_size: int = 64,
        render_profile: str = "fast",
        cameras: tuple[str, ...] = ("front", "wrist"),
        observe: str = "image",
        randomization: str | Randomization | None = None,
        motion: str | SceneMotion | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.DISABLED,
        threads: int = 1,
        record_state: bool = False,
    ) -> None:
        if observe not in ("image", "state"):
            raise ConfigError(f"observe is '{observe}'; expected 'image' or 'state'")
        if num_envs < 1:
            raise ConfigError(f"num_envs is {num_envs}; expected at least 1")
        if threads < 0:
            raise ConfigError(f"threads is {threads}; expected at least 0, which means all CPUs")
        if autoreset_mode not in (AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP):
            raise ConfigError(f"autoreset_mode {autoreset_mode} is not supported; use DISABLED or NEXT_STEP")
        self.task = load_task(task)
        self.embodiment = embodiment or panda_embodiment(image_size, cameras=cameras, render_profile=render_profile)
        if self.embodiment.action.mode != "ee_delta":
            raise ConfigError(
                f"embodiment '{self.embodiment.name}' has action mode '{self.embodiment.action.mode}'; the simulation "
                "takes 'ee_delta' (absolute targets are for robots behind ROS 2)"
            )
        self.embodiment.require_simulated()
        if observe == "image" and not self.embodiment.cameras:
            raise ConfigError(
                f"observe is 'image', and embodiment '{self.embodiment.name}' has no cameras; expected at least one, "
                "or 'state' for no images"
            )
        self.images_wanted = True
        self.observe, self.autoreset_mode, self.record_state = observe, autoreset_mode, record_state
        self.randomization = load_randomization(randomization)
        self._require_room_to_start()
        self.num_envs = num_envs
        self.metadata = {
            **type(self).metadata, "autoreset_mode": autoreset_mode, "render_fps": self.embodiment.control_hz
        }  # fmt: skip
        self.model = build_model(self.task, self.embodiment)
        self.objects = index_objects(self.model, self.task)
        self.substeps = round(self.embodiment.control_period_s / self.model.opt.timestep)
        self._define_spaces()
        self._bind(threads)
        self._allocate()
        self._renderer: BatchRenderer | None = None
        self._varied = None
        if self.randomization != Randomization():
            self._varied = VariedModels(self.batch, self.task, self.objects)
        self.set_motion(motion)
        self.motion, self._mover = self._next_motion

    # Construction -----------------------------------------------------------------------------------------

    def _require_room_to_start(self) -> None:
        tallest, top = max(self.task.objects, key=lambda item: item.height_m), self.embodiment.workspace_high_m[2]
        highest = top - START_HEIGHT_M[0]
        if self.randomization.start_anywhere and tallest.height_m > highest:
            raise TaskError(
                f"{self.task.source or self.task.name}: '{tallest.name}' is {tallest.height_m:g} m high. An arm that "
                f"starts anywhere (randomization 'start_anywhere') begins {START_HEIGHT_M[0]:g} m or more above it, "
                f"and its workspace ends at {top:g} m: make it at most {highest:g} m high, or use a randomization with "
                "start_anywhere 0, such as 'standard'"
            )

    def _define_spaces(self) -> None:
        box = gym.spaces.Box
        single: dict[str, gym.Space[Any]] = {}
        if self.observe == "image":
            for camera in self.embodiment.cameras:
                single[f"{camera.name}_image"] = box(0, 255, (camera.height, camera.width, 3), np.uint8)
        single["proprio"] = box(-np.inf, np.inf, (self.embodiment.proprio.dim,), np.float32)
        single["object_state"] = box(-np.inf, np.inf, (len(self.task.object_state_names),), np.float32)
        self.single_observation_space = gym.spaces.Dict(single)
        self.single_action_space = box(-1.0, 1.0, (self.embodiment.action.dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _bind(self, threads: int) -> None:
        self.batch = Batch(self.model, self.num_envs, threads, persistent=True)
        names = ["qpos", "qvel", "ctrl", "mocap_pos", "mocap_quat", "site_xpos", "site_xmat", "sensordata"]
        names += list(DRAWN_FIELDS) if self.observe == "image" else []
        self.fields = {name: self.batch.bind(name) for name in names}
        self._tcp = self.model.site("tcp").id
        self._finger = int(self.model.joint("panda_finger_joint1").qposadr[0])

    def _allocate(self) -> None:
        count = self.num_envs
        self._position, self._quaternion = np.zeros((count, 3)), np.zeros((count, 4))
        self._quaternion[:, 1] = 1.0
        self._opening = np.ones(count)
        self._commands = np.zeros((count, MAX_LATENCY_STEPS + 1, self.model.nu))
        self._steps = np.zeros(count, dtype=np.int64)
        self._hold = np.zeros(count, dtype=np.int64)
        self._latency = np.zeros(count, dtype=np.int64)
        self._ended = np.zeros(count, dtype=bool)
        self._driven = np.zeros(count, dtype=bool)
        self._seeds = np.zeros(count, dtype=np.int64)
        self._instructions = np.full(count, "", dtype=object)
        self._faults = np.full(count, "", dtype=object)
        self._noise = [np.random.default_rng(0) for _ in range(count)]
        self._image_noise, self._joint_noise = np.zeros(count), np.zeros(count)
        self._joint_errors = np.zeros((count, 7))
        self._starts: list[tuple[np.ndarray, bool] | None] = [None] * count
        self._started = False

    # Gymnasium interface ----------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin new episodes.

        Args:
            seed: one per simulation, or an integer s for s, s+1, ...; None draws from the generator.
            options: ``reset_mask`` (N,) bool limits the reset to some simulations; ``init`` gives exact
                states ``(N, D)`` from :meth:`get_state` to start from.

        Returns:
            Observation and info of all simulations.

        Raises:
            ConfigError: unknown option, wrong shapes, or invalid seeds.
            TaskError: the task's goal holds before anything is done.
        """
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs, dtype=bool)))
        state = options.pop("init", None)
        if options:
            raise ConfigError(f"unknown reset options {sorted(options)}; expected 'reset_mask' or 'init'")
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ConfigError(f"reset_mask must be bool of shape ({self.num_envs},), got {mask.dtype} {mask.shape}")
        if not self._started and not mask.all():
            raise ConfigError("the first reset must reset every simulation; leave out reset_mask")
        slots = np.flatnonzero(mask)
        self._reset_slots(slots, self._complete_seeds(seed))
        if state is not None:
            self.set_state(np.asarray(state), mask)
            self._ended[slots] = False
        self._started = True
        info = self._info(self._scene())
        info["task_failed"] = np.zeros(self.num_envs, bool)
        return self._observe(slots, slots), info

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every running simulation by one control step.

        Simulations that have ended keep their last state until they are reset (``DISABLED``) or begin a new
        episode in this call, ignoring their action (``NEXT_STEP``).

        Args:
            actions: ``(N, 7)`` in [-1, 1].

        Returns:
            Observation, reward (1 once, on success), terminated (success, or the task's failure), truncated (horizon
            or fault), info.

        Raises:
            ActionError: wrong shape or dtype, not finite, or out of range.
        """
        if not self._started:
            raise ConfigError("call reset() before step()")
        actions = check_action(actions, (self.num_envs, self.embodiment.action.dim))
        restarted = np.flatnonzero(self._ended) if self.autoreset_mode is AutoresetMode.NEXT_STEP else np.empty(0, int)
        if len(restarted):
            self._reset_slots(restarted, self._complete_seeds(None))
        running = ~self._ended
        running[restarted] = False
        self._advance(actions, running)
        scene = self._scene()
        reached = self.task.goal_predicate(scene)
        self._hold[running] = np.where(reached, self._hold + 1, 0)[running]
        success = self._hold >= SUCCESS_HOLD_STEPS
        failed = np.zeros(self.num_envs, bool)
        if self.task.failure_predicate is not None:
            failed = self.task.failure_predicate(scene)
        fault = self._faults != ""
        success &= ~failed & ~fault
        terminated = success | (failed & ~fault)
        truncated = ((self._steps >= self.task.horizon) & ~terminated) | fault
        self._ended = terminated | truncated
        fresh = np.isin(np.arange(self.num_envs), restarted)
        measured = np.flatnonzero(running | fresh)
        drawn = np.flatnonzero((running & (self.images_wanted | self._ended)) | fresh)
        info = self._info(scene, success)
        info["task_failed"] = failed
        # An episode that has ended is paid no more.
        reward = (success & running).astype(np.float64)
        return self._observe(measured, drawn), reward, terminated, truncated, info

    def close(self, **kwargs: Any) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # Simulation only --------------------------------------------------------------------------------------

    def get_state(self) -> np.ndarray:
        """Exact state ``(N, D)`` float64: MuJoCo's integration state, target, delayed commands, counters.

        With :meth:`set_state` in an environment of the same task, replay is bit-identical. Drawn variations,
        noise generators and how a scene moves by itself are not part of it; reset with the same seed restores the
        former.
        """
        counters = np.stack([self._opening, self._steps, self._hold, self._ended], axis=-1)
        commands = self._commands.reshape(self.num_envs, -1)
        return np.concatenate([self.batch.state, self._position, self._quaternion, counters, commands], axis=-1)

    def set_state(self, state: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Restore rows of ``state`` ``(N, D)`` where ``mask`` ``(N,)`` is true (default: all).

        Raises:
            ConfigError: wrong shape, e.g. the state of another task.
        """
        width = self.batch.nstate + 11 + self._commands[0].size
        if state.shape != (self.num_envs, width):
            raise ConfigError(
                f"state has shape {state.shape}; task '{self.task.name}' needs ({self.num_envs}, {width})"
            )
        slots = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        rows = state[slots]
        parts = np.split(rows, np.cumsum([self.batch.nstate, 3, 4, 4]), axis=-1)
        self._position[slots], self._quaternion[slots] = parts[1], parts[2]
        self._opening[slots] = parts[3][:, 0]
        self._steps[slots], self._hold[slots] = parts[3][:, 1], parts[3][:, 2]
        self._ended[slots] = parts[3][:, 3] > 0
        self._commands[slots] = parts[4].reshape(len(slots), *self._commands.shape[1:])
        self._faults[slots] = ""
        self.batch.state[slots] = parts[0]
        self.batch.forward(slots, _STAGE_VEL)
        # forward() refreshes derived fields; the warm start of the solver must stay the recorded one.
        self.batch.state[slots] = parts[0]

    def set_motion(self, motion: str | SceneMotion | None) -> None:
        """Choose how the scene moves from the next reset of all simulations on; until then it goes on as it began.

        Raises:
            ConfigError: unknown motion, or it would move nothing of this task.
        """
        chosen = load_motion(motion)
        used = chosen.active or chosen.places_cameras
        mover = SceneMover(chosen, self.task, self.embodiment, self.num_envs) if used else None
        self._next_motion = chosen, mover

    def set_instruction(self, text: str, mask: np.ndarray | None = None) -> None:
        """Change the language instruction of the simulations where ``mask`` is true (default: all)."""
        self._instructions[np.ones(self.num_envs, bool) if mask is None else mask] = text

    # Reset ------------------------------------------------------------------------------------------------

    def _complete_seeds(self, seed: int | Sequence[int | None] | None) -> list[int]:
        given = one_seed_each(seed, self.num_envs)
        if isinstance(seed, int | np.integer):
            # With its seed: without one, asking for np_random_seed would put another generator in its place.
            self._np_random, self._np_random_seed = np.random.default_rng(int(seed)), int(seed)
        elif None not in given:
            # Episodes that begin by themselves later follow from these seeds, too.
            self._np_random, self._np_random_seed = np.random.default_rng(given), -1
        return [int(self.np_random.integers(2**31)) if value is None else value for value in given]

    def _reset_slots(self, slots: np.ndarray, seeds: list[int]) -> None:
        """Begin new episodes; a draw that is over before it begins is followed by another from the same seed."""
        if len(slots) == self.num_envs:
            self.motion, self._mover = self._next_motion
        self._seeds[slots] = [seeds[slot] for slot in slots]
        generators = {int(slot): np.random.default_rng(seeds[slot]) for slot in slots}
        for _ in range(MAX_DRAWS):
            self._begin(slots, generators)
            scene = self._scene()
            over = self.task.goal_predicate(scene)
            if self.task.failure_predicate is not None:
                over = over | self.task.failure_predicate(scene)
            slots = slots[over[slots]]
            if not len(slots):
                return
        either = " or 'failure'" if self.task.failure else ""
        raise TaskError(
            f"{self.task.source or self.task.name}: key 'goal' ({self.task.goal}){either} holds before anything is "
            f"done (seed {seeds[slots[0]]}, {MAX_DRAWS} draws). Change 'goal'{either} or 'initial'."
        )

    def _begin(self, slots: np.ndarray, generators: dict[int, np.random.Generator]) -> None:
        """Put everything where the next draw of the generators says."""
        self.batch.reset(slots, stage=_STAGE_NONE)
        for slot in slots:
            self._place(int(slot), generators[int(slot)])
        if self._varied is not None:
            self.batch.set_const(slots)
        self.batch.forward(slots, _STAGE_ACC)
        self._position[slots] = self.fields["site_xpos"][slots, self._tcp]
        matrices = self.fields["site_xmat"][slots, self._tcp].reshape(-1, 3, 3)
        self._quaternion[slots] = rotation.from_matrix(matrices)
        self._opening[slots] = 1.0
        self._move_to_start(slots)
        commands = pose_to_control(self._position, self._quaternion, self._opening)
        self._commands[slots] = commands[slots][:, None]
        self.fields["ctrl"][slots] = commands[slots]
        self._steps[slots], self._hold[slots], self._ended[slots], self._driven[slots] = 0, 0, False, False
        self._faults[slots] = ""
        if self._mover is not None:
            for slot in slots:
                self._mover.begin(int(slot), int(self._seeds[slot]))

    def _move_to_start(self, slots: np.ndarray) -> None:
        """Drive the arms whose variation says so from home to where they start, before the episode begins."""
        moving = np.array([slot for slot in slots if self._starts[slot] is not None], dtype=int)
        if not len(moving):
            return
        tallest = max(item.height_m for item in self.task.objects)
        goals = np.array([self._starts[slot][0] for slot in moving]) + [0.0, 0.0, tallest]
        # The first action would move a target outside of the workspace back into it, further than an action may.
        goals = np.clip(goals, self.embodiment.workspace_low_m, self.embodiment.workspace_high_m)
        begin = self._position[moving].copy()
        self._opening[moving] = [0.0 if self._starts[slot][1] else 1.0 for slot in moving]
        # An arm takes as long at any control rate.
        period_s = self.substeps * self.model.opt.timestep
        steps, ramp = (max(1, round(seconds / period_s)) for seconds in (START_S, START_DRIVE_S))
        for share in np.minimum(1.0, np.arange(1, steps + 1) / ramp):
            self._position[moving] = begin + share * (goals - begin)
            self.fields["ctrl"][moving] = pose_to_control(
                self._position[moving], self._quaternion[moving], self._opening[moving]
            )
            self._step_physics(moving)
        self.batch.bind("time")[moving] = 0.0
        self.batch.forward(moving, _STAGE_VEL)

    def _place(self, slot: int, rng: np.random.Generator) -> None:
        """Put robot and objects of one simulation where its seed says."""
        initial = sample_initial_condition(self.task, rng)
        home = np.array(self.embodiment.home_joint_positions_rad)
        qpos = self.fields["qpos"][slot]
        qpos[:7] = home + rng.normal(0.0, HOME_NOISE_RAD, 7)
        qpos[self._finger : self._finger + 2] = FINGER_TRAVEL_M
        for index, item in enumerate(self.task.objects):
            where = self.objects[item.name]
            if item.fixed:
                self.fields["mocap_pos"][slot, where.mocap] = initial.positions[index]
                self.fields["mocap_quat"][slot, where.mocap] = initial.quaternions[index]
                if item.articulated:
                    qpos[where.joint_qpos] = initial.openings[index]
            else:
                qpos[where.qpos : where.qpos + 3] = initial.positions[index]
                qpos[where.qpos + 3 : where.qpos + 7] = initial.quaternions[index]
        self._instructions[slot] = initial.instruction
        if self._varied is not None:
            variation = sample_variation(
                self.randomization, rng, cameras=self.model.ncam, objects=len(self.task.objects),
                table_looks=len(TABLE_LOOKS),
            )  # fmt: skip
            self._varied.apply(slot, variation)
            self._latency[slot] = variation.latency_steps
            self._starts[slot] = None if variation.start_m is None else (variation.start_m, variation.start_closed)
            self._image_noise[slot], self._joint_noise[slot] = variation.image_noise, variation.joint_noise_rad
            self._noise[slot] = rng

    # Step -------------------------------------------------------------------------------------------------

    def _advance(self, actions: np.ndarray, running: np.ndarray) -> None:
        everyone = bool(running.all())
        moved = integrate_pose(self._position, self._quaternion, actions, self.embodiment)
        if everyone:
            self._position, self._quaternion, self._opening = moved
        else:
            for kept, new in zip((self._position, self._quaternion, self._opening), moved, strict=True):
                kept[running] = new[running]
        slots = slice(None) if everyone else np.flatnonzero(running)
        commands = pose_to_control(self._position[slots], self._quaternion[slots], self._opening[slots])
        if self._varied is not None:
            history = self._commands[slots]
            history = np.concatenate([commands[:, None], history[:, :-1]], axis=1)
            self._commands[slots] = history
            commands = history[np.arange(len(history)), self._latency[slots]]
        self.fields["ctrl"][slots] = commands
        self._steps[slots] += 1
        self._driven[running] |= np.abs(actions[running, :6]).max(axis=-1) > 0
        self._move_scene(np.flatnonzero(running & self._driven), self.embodiment.control_period_s)
        if everyone or running.any():
            self._step_physics(None if everyone else slots)

    def _move_scene(self, slots: np.ndarray, period_s: float) -> None:
        """Overwrite the poses of what moves by itself."""
        if self._mover is None:
            return
        for moved in self._mover.advance(self._scene(), slots, period_s):
            put_planar(self.fields, self.objects[moved.name], moved)

    def _step_physics(self, slots: np.ndarray | None) -> None:
        try:
            self.batch.step(slots, nstep=self.substeps, stage=_STAGE_VEL)
        except SimulationError:
            for slot in np.flatnonzero(self.batch.status):
                self._faults[slot] = f"simulator error: {self.batch.error(int(slot))}"
        # NaN fails the comparison, so it counts as diverged.
        stepped = np.arange(self.num_envs) if slots is None else slots
        state = self.batch.state[stepped]
        sane = (np.abs(state) < DIVERGED_STATE).all(axis=-1)
        for slot in stepped[~sane]:
            self._faults[slot] = self._faults[slot] or "simulation diverged"

    def _scene(self) -> SceneView:
        return view_scene(self.fields, self.task, self.objects, self._tcp, self._finger)

    def _observe(self, measured: np.ndarray, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Build the observation: joints are measured anew in the simulations ``measured``, images drawn in ``drawn``.

        The others keep their noise, too: an episode must not depend on when its neighbours end.
        """
        observation: dict[str, np.ndarray] = {}
        if self.observe == "image":
            observation |= self._draw(drawn)
        qpos = self.fields["qpos"]
        joints = qpos[:, :7]
        if self._joint_noise.any():
            for slot in measured:
                self._joint_errors[slot] = self._joint_noise[slot] * self._noise[slot].normal(size=7)
            joints = joints + self._joint_errors
        matrices = self.fields["site_xmat"][:, self._tcp].reshape(-1, 3, 3)
        observation["proprio"] = build_proprio(
            self.fields["site_xpos"][:, self._tcp], matrices, self._position,
            qpos[:, self._finger] / FINGER_TRAVEL_M, joints,
        )  # fmt: skip
        observation["object_state"] = object_state(self.fields, self.task, self.objects)
        return observation

    def drawn_scene(self, drawn: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Fields and looks as ``BatchRenderer.render`` takes them for the simulations ``drawn``."""
        fields = dict(self.fields)
        if self._mover is not None:
            ids = {camera.name: self.model.camera(camera.name).id for camera in self._mover.cameras}
            fields |= self._mover.displace_cameras(self.fields, ids, drawn)
        return fields, dict(self._varied.looks) if self._varied else {}

    def _draw(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        if self._renderer is None:
            self._renderer = BatchRenderer(self.model, self.embodiment, self.num_envs)
            spaces = self.observation_space.spaces
            self._images = {key: np.zeros(spaces[key].shape, np.uint8) for key in self.embodiment.image_keys}
        fields, looks = self.drawn_scene(drawn)
        images = self._renderer.render(fields, drawn, looks)
        for key, new in zip(self.embodiment.image_keys, images, strict=True):
            for row, slot in enumerate(drawn):
                if self._image_noise[slot]:
                    noise = self._noise[slot].normal(0.0, self._image_noise[slot], new[row].shape)
                    new[row] = np.clip(np.rint(new[row] + noise), 0, 255).astype(np.uint8)
            self._images[key][drawn] = new
        return {key: image.copy() for key, image in self._images.items()}

    def _info(self, scene: SceneView, success: np.ndarray | None = None) -> dict[str, Any]:
        pose = [self._position, rotation.to_6d(self._quaternion), self._opening[:, None]]
        info: dict[str, Any] = {
            "success": np.zeros(self.num_envs, bool) if success is None else success,
            "milestones": {name: predicate(scene) for name, predicate in self.task.milestone_predicates.items()},
            "contacts": {name: touch.any(axis=-1) for name, touch in scene.touches.items()},
            "instruction": self._instructions.copy(),
            "target": np.concatenate(pose, axis=-1),
            "sim_fault": self._faults.copy(),
            "init_id": self._seeds.copy(),
        }
        if self._mover is not None:
            info["scene_motion"] = self._mover.log()
        if self.record_state:
            info["sim_state"] = self.get_state()
        return info

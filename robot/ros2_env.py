"""The robot on the ROS 2 graph as a Gymnasium environment: the same interface as the simulator, in real time."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.action import build_proprio, check_action, integrate_action
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, RobotError, SafetyError, StaleObservationError, closest
from simtoreal.envs.rollout import Observation
from simtoreal.envs.scene_motion import SceneMotion, load_motion
from simtoreal.envs.task import TaskSpec, sample_initial_condition
from simtoreal.robot.gate_limits import ROUNDING, rotation_between
from simtoreal.robot.homing import path_home
from simtoreal.robot.inputs import ARM_SENSORS, Arm, RobotInputs
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.timing import PeriodicClock
from simtoreal.robot.topics import RobotConfig
from simtoreal.robot.twin_client import TwinClient

if TYPE_CHECKING:
    from simtoreal.robot.camera import Camera

READY_TIMEOUT_S = 15.0
# Deadlines are put this long after the arrival of an image, so that cameras at the control rate are never one
# period old because of a millisecond of jitter.
IMAGE_JITTER_S = 0.006
HOME_TOLERANCE_RAD = 0.15
# A hand that is nearer has come home, wherever the rest of the arm is.
HOME_TOLERANCE_M = 0.03


class TargetSink(Protocol):
    """Takes absolute targets: the safety gate (:class:`simtoreal.robot.gate.SafetyGate`)."""

    def begin_episode(self, episode: int) -> None:
        """Command nothing until the first target; only targets of ``episode`` count from now on."""

    def report_observation(self, observation_ns: int) -> None:
        """Tell when the oldest image in use arrived (monotonic ns)."""

    def holding(self) -> str:
        """Why the arm is held although targets come, or an empty string; targets must not get ahead of it meanwhile."""

    def end_episode(self) -> None:
        """Come to rest: no more targets follow, and that is no fault."""

    def send_target(self, target: np.ndarray, at_ns: int, episode: int) -> None:
        """Move towards ``target`` ``(10,)`` (``TARGET_NAMES``), to be reached at monotonic time ``at_ns``."""


class Ros2Env(gym.Env[Observation, np.ndarray]):
    """One robot arm and its cameras, in real time: every step lasts one control period.

    Observations, actions and info entries are those of ``TabletopEnv``. Added to info are ``robot_fault`` (why the
    robot holds at the moment, empty when all is well), ``observation_ns`` (monotonic time of arrival of the oldest
    input used), ``twin_skipped_s`` (time of the episode that a slow twin did not simulate) and the stamps of every
    sensor, in nanoseconds of the monotonic clock: ``timestamp_ns`` (when the inputs were read), ``capture_ns`` and
    ``receive_ns`` (of what the observation shows, by sensor: ``joint_states``, ``gripper``, every camera), and
    ``received_frames`` and ``dropped_frames`` (by sensor, since the reset).

    While an input is stale, frozen or implausible no target is sent, and observation and stamps stay what they were;
    after ``staleness.stop_s`` the episode is truncated with the reason in ``info["sim_fault"]``. While only the gate
    misses an input it has the same target again and again, so that the arm does not rush after it later.

    Success, milestones and contacts are judged by the twin. A real robot has no judge: they stay False, and people
    label the recording.

    Args:
        task: what the robot is told to do.
        embodiment: robot, cameras, rate and limits; those of the policy's checkpoint.
        config: topics, see :func:`simtoreal.robot.topics.load_robot_config`.
        gate: where targets go.
        cameras: cameras read by this process (RealSense, USB) instead of from their image topics, by name.
        operator: None when a twin answers. On a real robot: shows a text to the person at it and returns once they
            agree. Asked twice at every reset: before the arm moves home, and then to arrange the scene.
        check_robot: called while the robot is silent; raises what is wrong with it, e.g. that its process has died.
        check_operator: called before every target on the way home; raises when nobody can stop the arm any more, or
            somebody does. The arm then comes to rest at once.
        observe: ``"image"`` (cameras and proprio) or ``"state"`` (proprio only).
        observe_truth: adds the twin's ``object_state``; for testing experts, never for policies.

    Raises:
        ConfigError: unknown camera, other robot, or contradictory options.
        MissingDependencyError: ROS 2 is not installed.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own declaration)
    real_time = True

    def __init__(
        self,
        task: TaskSpec,
        *,
        embodiment: Embodiment,
        config: RobotConfig,
        gate: TargetSink,
        cameras: Mapping[str, Camera] | None = None,
        operator: Callable[[str], None] | None = None,
        check_robot: Callable[[], None] | None = None,
        check_operator: Callable[[], None] = lambda: None,
        observe: str = "image",
        observe_truth: bool = False,
    ) -> None:
        _check_options(embodiment, config, observe, observe_truth, operator)
        if operator is None:
            config = _without_camera_sizes(config)
        self.task, self.embodiment, self.config = task, embodiment, config
        self._gate, self._operator, self._check_operator = gate, operator, check_operator
        self._images, self._truth_observed = observe == "image", observe_truth
        self.metadata = {"render_modes": [], "render_fps": embodiment.control_hz}
        self.action_space = _action_space(embodiment)
        self.observation_space = _observation_space(embodiment, task, self._images, observe_truth)
        self._kinematics = Kinematics(embodiment)
        self.clock = PeriodicClock(embodiment.control_period_s)
        self._inputs = RobotInputs(
            config,
            embodiment if self._images else _without_cameras(embodiment),
            self._kinematics.joint_low_rad,
            self._kinematics.joint_high_rad,
            cameras,
            check_robot,
        )
        self._twin = None if operator else TwinClient(self._inputs, config)
        self._episode = int.from_bytes(uuid.uuid4().bytes[:3], "big") << 16
        self._seed_generator = np.random.default_rng()
        self._steps = 0
        self._instruction = ""
        self._target = np.zeros(10)
        self._observation: Observation = {}
        self._fault, self._fault_since_ns = "", 0
        self._gate_holds = False
        self._observation_ns = self._timestamp_ns = 0
        self._capture_ns: dict[str, int] = {}
        self._receive_ns: dict[str, int] = {}
        self._judgement: dict[str, Any] = {}
        self._began = False
        self._motion: SceneMotion | None = None
        self.twin_skipped_s: dict[int, float] = {}
        """Seconds that the twin did not simulate, by episode."""

    # -- Gymnasium -----------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode with the arm at home: the twin resets itself, an operator arranges a real scene.

        Args:
            seed: initial condition; None draws one.
            options: none are known.

        Raises:
            ConfigError: an option was given.
            StaleObservationError: the twin does not answer or an input stays silent.
            RobotError: an input is implausible, or the arm is not at home afterwards.
        """
        if options:
            raise ConfigError(f"unknown reset options {sorted(options)}; a robot has none")
        super().reset(seed=seed)
        if seed is None:
            seed = int(self._seed_generator.integers(2**31))
        self._episode += 1
        self._instruction = task_instruction(self.task, seed)
        self._inputs.wait_until_ready(READY_TIMEOUT_S)
        self._gate.begin_episode(self._episode)
        if self._twin is not None:
            self._twin.reset(self._episode, seed, self.task.name, self._motion)
        elif self._operator is not None:
            self._operator(
                "The arm will open its fingers, rise and move home in a straight line; you will arrange the scene "
                "after that. Clear its way and step back."
            )
            # It may have been moved by hand in the meantime.
            arm = self._inputs.wait_until_ready(READY_TIMEOUT_S, after_ns=time.monotonic_ns())
            self._gate.begin_episode(self._episode)
            try:
                self._move_home(arm)
            finally:
                self._gate.end_episode()
            self._operator(f"Arrange '{self.task.name}' (initial condition {seed}) and step back; the policy starts.")
            self._gate.begin_episode(self._episode)
        self._begin()
        return self._copy_observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Send the target of ``action`` and return what is seen one control period later.

        Raises:
            ActionError: see :func:`simtoreal.envs.action.check_action`; nothing was sent.
            RobotError: :meth:`reset` was not called.
        """
        bounded = self.embodiment.action.mode == "ee_delta"
        action = check_action(action, (self.embodiment.action.dim,), bounded=bounded)
        if not self._began:
            raise RobotError("call reset before step")
        refused = ""
        if not self._fault:
            self._target = self._next_target(self._target, action)
        if not self._fault or self._gate_holds:
            try:
                self._gate.report_observation(self._observation_ns)
                # Due at once: simulation, too, gives a target to the arm at the beginning of the period. The gate
                # smooths the steps; a due time at the end of the period would only add half a period of lag.
                self._gate.send_target(self._target.copy(), time.monotonic_ns(), self._episode)
            except SafetyError as error:
                refused = str(error)
        self.clock.wait()
        self._observe()
        self._steps += 1
        info = self._info()
        self.twin_skipped_s[self._episode] = info["twin_skipped_s"]
        info["sim_fault"] = refused or info["sim_fault"]
        success = bool(info["success"])
        held_s = (time.monotonic_ns() - self._fault_since_ns) * 1e-9 if self._fault else 0.0
        if held_s > self.config.staleness.stop_s:
            info["sim_fault"] = f"{self._fault} (held for {held_s:.1f} s)"
        failed, late = bool(info["sim_fault"]), self._steps >= self.task.horizon
        if failed or success or late:
            with contextlib.suppress(SafetyError):  # a gate that is gone is reported by the next episode
                self._gate.end_episode()
        if failed:
            return self._copy_observation(), 0.0, False, True, info
        return self._copy_observation(), float(success), success, late, info

    def set_instruction(self, text: str) -> None:
        """Change the language instruction, also in the middle of an episode.

        Raises:
            ConfigError: not a text, or empty.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"an instruction must be a non-empty text, got {text!r}")
        self._instruction = text

    def close(self) -> None:
        """Leave the ROS graph. The gate is not ours to close."""
        self._inputs.close()

    def set_motion(self, motion: str | SceneMotion | None) -> None:
        """Choose how the twin's scene moves in episodes that begin from now on.

        Raises:
            ConfigError: unknown motion, or there is no twin: what moves a real scene is not on this graph.
        """
        if self._twin is None:
            raise ConfigError("scene motion needs the twin; move a real scene by a turntable, a belt or by hand")
        self._motion = load_motion(motion)

    # -- parts ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Take the first observation. Nothing moves yet, so an input that stalls is waited for again."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            arm = self._inputs.wait_until_ready(READY_TIMEOUT_S, after_ns=time.monotonic_ns())
            self._check_at_home(arm)
            # As in simulation, the first target is where the arm is.
            position, quaternion = self._kinematics.forward(arm.joint_positions_rad)
            self._target = np.concatenate([position, rotation.to_6d(quaternion), [1.0]])
            self._steps, self._fault, self._began, self._judgement = 0, "", True, {}
            try:
                self._align_clock()
            except StaleObservationError as error:
                self._fault = str(error)
            else:
                self._inputs.restart_counts()
                self._observe()
            if not self._fault:
                return
            if time.monotonic() > deadline:
                raise StaleObservationError(f"the episode cannot begin: {self._fault}")

    def _next_target(self, target: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The target ``(10,)`` after ``target``: that of the action, or as far on the way as the gate's limits allow.

        The defaults allow every action. With slower ones the policy sees in its target that it advances less, instead
        of being stopped for commanding what the arm may not follow.
        """
        wanted = integrate_action(target, action, self.embodiment)
        if self.embodiment.action.mode != "ee_delta":
            return wanted  # an absolute target far away is a mistake, which the gate is to see
        largest_m, largest_rad = self.config.limits.target_step(self.embodiment.control_period_s)
        move = wanted[:3] - target[:3]
        distance = float(np.linalg.norm(move))
        if distance > largest_m:
            wanted[:3] = target[:3] + move * (largest_m * ROUNDING / distance)
        start, end = rotation.from_6d(target[3:9]), rotation.from_6d(wanted[3:9])
        turn = rotation_between(start, end)
        angle = float(np.linalg.norm(turn))
        if angle > largest_rad:
            part = rotation.from_rotation_vector(turn * (largest_rad * ROUNDING / angle))
            wanted[3:9] = rotation.to_6d(rotation.quaternion_multiply(part, start))
        return wanted

    def _observe(self) -> None:
        """Read all inputs; on a fault keep the previous observation with its stamps and remember why."""
        try:
            arm = self._inputs.read_arm()
            seen = self._inputs.read_images(arm)
            self._timestamp_ns = time.monotonic_ns()
            if self._twin is not None and not self._twin.truth():
                raise RobotError("the twin has begun another episode: somebody else asked for one")
        except RobotError as error:
            self._timestamp_ns = time.monotonic_ns()
            if not self._fault:
                self._fault_since_ns = self._timestamp_ns
            self._fault, self._gate_holds = str(error), False
            return
        holds = ""
        with contextlib.suppress(SafetyError):  # a gate that is gone is reported by the next target
            holds = self._gate.holding()
        if holds and not self._fault:
            self._fault_since_ns = self._timestamp_ns
        self._fault, self._gate_holds = holds, bool(holds)
        self._observation_ns = seen.arrived_ns
        arm_captured, arm_arrived = (dict.fromkeys(ARM_SENSORS, at) for at in (arm.capture_ns, arm.arrived_ns))
        self._capture_ns, self._receive_ns = arm_captured | seen.capture_ns, arm_arrived | seen.receive_ns
        observation: Observation = dict(seen.images)
        position, quaternion = self._kinematics.forward(arm.joint_positions_rad)
        observation["proprio"] = build_proprio(
            position,
            rotation.to_matrix(quaternion),
            self._target[:3],
            np.asarray(arm.opening),
            arm.joint_positions_rad,
        )
        if self._truth_observed and self._twin is not None:
            observation["object_state"] = np.array(self._twin.truth()["object_state"], dtype=np.float32)
        self._observation = observation

    def _copy_observation(self) -> Observation:
        return {key: value.copy() for key, value in self._observation.items()}

    def _info(self) -> dict[str, Any]:
        truth = self._twin.truth() if self._twin is not None else {}
        # The same names at every step, also while the twin is silent: a recording has fixed columns.
        self._judgement = judged = truth or self._judgement
        counts = self._inputs.frame_counts()
        return {
            "success": bool(truth.get("success", False)),
            "milestones": dict(truth.get("milestones", dict.fromkeys(self.task.milestones, False))),
            "contacts": dict(judged.get("contacts", {})),
            "instruction": self._instruction,
            "target": self._target.copy(),
            "sim_fault": str(truth.get("fault", "")),
            "robot_fault": self._fault,
            "observation_ns": self._observation_ns,
            "twin_skipped_s": float(truth.get("skipped_s", 0.0)),
            **({"scene_motion": dict(judged["scene_motion"])} if judged.get("scene_motion") else {}),
            "timestamp_ns": self._timestamp_ns,
            "capture_ns": dict(self._capture_ns),
            "receive_ns": dict(self._receive_ns),
            "received_frames": {name: count.received for name, count in counts.items()},
            "dropped_frames": {name: count.dropped for name, count in counts.items()},
        }

    def _align_clock(self) -> None:
        """Put the control deadlines just behind the arrival of images."""
        for _, camera in self._inputs.cameras.values():
            limit = self.config.staleness.camera_s
            camera.wait(limit, after=camera.read(limit).sequence)
            time.sleep(IMAGE_JITTER_S)
            break
        self.clock.restart()

    def _check_at_home(self, arm: Arm) -> None:
        apart = arm.joint_positions_rad - self.embodiment.home_joint_positions_rad
        index = int(np.abs(apart).argmax())
        if abs(apart[index]) <= HOME_TOLERANCE_RAD:
            return
        hand, _ = self._kinematics.forward(arm.joint_positions_rad)
        home, _ = self._kinematics.forward(np.array(self.embodiment.home_joint_positions_rad))
        why = (
            "Is the gate stopped, or the path blocked?"
            if np.linalg.norm(hand - home) > HOME_TOLERANCE_M
            else "The hand is there, but the elbow is not, which targets of the hand do not move: move it by hand, or "
            "let the controller's null space rest at the embodiment's home_joint_positions_rad."
        )
        raise RobotError(
            f"the arm is not at home: '{self.config.joint_names[index]}' is {apart[index]:.2f} rad away. {why}"
        )

    def _move_home(self, arm: Arm) -> None:
        """Drive a real arm home through the gate."""
        path = path_home(arm.joint_positions_rad, self._kinematics, self.embodiment, self.config.limits)
        self.clock.restart()
        step, silent_since_ns = 0, 0
        while step < len(path):
            self._check_operator()
            try:
                self._inputs.read_arm()
            except StaleObservationError:
                # As in an episode: hold for a while, then give up. Counted from when it was noticed: a machine that
                # stalls finds every input old when it goes on.
                silent_since_ns = silent_since_ns or time.monotonic_ns()
                if (time.monotonic_ns() - silent_since_ns) * 1e-9 > self.config.staleness.stop_s:
                    raise
                self.clock.wait()
                continue
            silent_since_ns = 0
            self._gate.send_target(path[step], time.monotonic_ns(), self._episode)
            # While the gate holds it has the same target again; it gives up by itself.
            step += not self._gate.holding()
            self.clock.wait()


def _check_options(
    embodiment: Embodiment, config: RobotConfig, observe: str, observe_truth: bool, operator: object
) -> None:
    if observe not in ("image", "state"):
        raise ConfigError(f"observe '{observe}' is unknown. {closest(observe, ('image', 'state'))}")
    if observe_truth and operator is not None:
        raise ConfigError("observe_truth needs the twin: a real robot has no scene truth")
    config.require_fits(embodiment, "the robot yaml")
    if embodiment.action.mode not in ("ee_delta", "ee_abs"):
        raise ConfigError(f"action mode '{embodiment.action.mode}' has no end-effector target")


def task_instruction(task: TaskSpec, seed: int) -> str:
    """Instruction that belongs to a seed, the same as in simulation."""
    return sample_initial_condition(task, np.random.default_rng(seed)).instruction


def _without_cameras(embodiment: Embodiment) -> Embodiment:
    return dataclasses.replace(embodiment, cameras=())


def _without_camera_sizes(config: RobotConfig) -> RobotConfig:
    """The twin has the policy's pixels, whatever the cameras of the real robot have."""
    cameras = {name: dataclasses.replace(topics, width=None, height=None) for name, topics in config.cameras.items()}
    return dataclasses.replace(config, cameras=cameras)


def _action_space(embodiment: Embodiment) -> gym.spaces.Box:
    bound = 1.0 if embodiment.action.mode == "ee_delta" else np.inf
    return gym.spaces.Box(-bound, bound, (embodiment.action.dim,), np.float32)


def _observation_space(embodiment: Embodiment, task: TaskSpec, images: bool, truth: bool) -> Any:
    spaces: dict[str, gym.Space[Any]] = {}
    for camera in embodiment.cameras if images else ():
        spaces[f"{camera.name}_image"] = gym.spaces.Box(0, 255, (camera.height, camera.width, 3), np.uint8)
    spaces["proprio"] = gym.spaces.Box(-np.inf, np.inf, (embodiment.proprio.dim,), np.float32)
    if truth:
        spaces["object_state"] = gym.spaces.Box(-np.inf, np.inf, (len(task.object_state_names),), np.float32)
    return gym.spaces.Dict(spaces)

"""The interface as an executable contract, for our backends and for anybody's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from simtoreal.envs import rotation
from simtoreal.envs.action import integrate_action
from simtoreal.envs.embodiment import TARGET_NAMES, Embodiment
from simtoreal.envs.errors import ActionError, SimtorealError
from simtoreal.envs.rollout import Observation, SingleVectorEnv

INFO_KEYS = ("success", "milestones", "instruction", "target", "contacts", "sim_fault")
# A moving arm may lag, sag and overshoot; a wrong frame, sign or unit misses by far more.
MOTION_TOLERANCE_M = 0.02
MOTION_TOLERANCE_RAD = 0.12
# Without promised determinism the arm must still start at home, within joint noise and sag.
HOME_TOLERANCE = 0.05
PERIOD_TOLERANCE = 0.2


class ContractError(SimtorealError):
    """An environment breaks the interface; the message lists every violation found."""


def check_robot_env(env: gym.Env | VectorEnv, *, deterministic: bool, seed: int = 0) -> None:
    """Check that an environment keeps the interface that experts, policies and recorders rely on.

    Checked are spaces and dtypes, that returned arrays are the caller's own, info entries, the instruction,
    refusal of bad actions, the target arithmetic, that the arm moves where it is told (so the environment is
    driven), seeds, exact states where offered, the end of episodes, and the rate of real-time environments
    (those with ``real_time = True``). What an embodiment of the action mode ``env`` does not have (proprio, an
    end-effector target) is not asked of its environment.

    Args:
        env: a single environment, or a vector environment; left in the middle of an episode.
        deterministic: whether equal seeds must give bit-identical episodes.
        seed: first seed used.

    Raises:
        ContractError: lists every violation.
    """
    contract = _Contract(env, deterministic, seed)
    contract.check()
    if contract.failures:
        listed = "\n  - ".join(contract.failures)
        raise ContractError(f"{env} breaks the interface in {len(contract.failures)} ways:\n  - {listed}")


class _Contract:
    def __init__(self, env: gym.Env | VectorEnv, deterministic: bool, seed: int) -> None:
        self.failures: list[str] = []
        self.env: Any = env
        self.base: Any = env.unwrapped
        self.single = not isinstance(env, VectorEnv)
        self.deterministic = deterministic
        self.seed = seed
        self.real_time = bool(getattr(self.base, "real_time", False))

    def expect(self, condition: bool, message: str) -> None:
        if not condition and message not in self.failures:
            self.failures.append(message)

    def attempt(self, name: str, part: Callable[[], None]) -> bool:
        """Run one part; whatever it raises is a violation, and the other parts still run."""
        before = len(self.failures)
        try:
            part()
        except Exception as error:  # the environment under test may raise anything
            self.expect(False, f"{name}: {type(error).__name__}: {error}")
        return len(self.failures) == before

    def check(self) -> None:
        if not self.attempt("description", self.check_description):
            return
        self.vector: Any = SingleVectorEnv(self.env) if self.single else self.env
        self.count = self.vector.num_envs
        self.attempt("reset", self.check_reset)
        if self.failures:
            return
        self.attempt("step", self.check_steps)
        self.attempt("bad actions", self.check_bad_actions)
        self.attempt("instruction", self.check_instruction)
        self.attempt("motion", self.check_motion)
        self.attempt("seeds", self.check_seeds)
        if callable(getattr(self.base, "get_state", None)) and callable(getattr(self.base, "set_state", None)):
            self.attempt("state", self.check_state)
        if self.real_time:
            self.attempt("timing", self.check_timing)
        elif self.vector.metadata.get("autoreset_mode") == AutoresetMode.DISABLED:
            self.attempt("end of episode", self.check_end)

    # -- description ---------------------------------------------------------------------------------

    def check_description(self) -> None:
        embodiment = getattr(self.base, "embodiment", None)
        if not isinstance(embodiment, Embodiment):
            self.expect(False, "env.unwrapped.embodiment must be an Embodiment")
            return
        self.embodiment = embodiment
        task = getattr(self.base, "task", None)
        self.expect(isinstance(getattr(task, "name", None), str), "env.unwrapped.task.name must be a text")
        horizon = getattr(task, "horizon", None)
        self.expect(isinstance(horizon, int) and horizon > 0, "env.unwrapped.task.horizon must be a positive int")
        observation = self.env.observation_space if self.single else self.env.single_observation_space
        action = self.env.action_space if self.single else self.env.single_action_space
        spec = embodiment.action
        shaped = action.dtype == np.float32 and action.shape == (spec.dim,)
        box = action if isinstance(action, gym.spaces.Box) and shaped else None
        self.expect(box is not None, f"the action space must be a float32 Box of shape ({spec.dim},), found {action}")
        if box is not None and spec.mode == "ee_delta":
            self.expect(bool((box.low == -1).all() and (box.high == 1).all()), "actions must span [-1, 1]")
        if not isinstance(observation, gym.spaces.Dict):
            self.expect(False, f"the observation space must be a Dict, found {type(observation).__name__}")
            return
        self.keys = tuple(observation.spaces)
        self.foreign = spec.mode == "env"
        wanted: dict[str, tuple[tuple[int, ...], type]] = {}
        if embodiment.proprio.dim or not self.foreign:
            wanted["proprio"] = ((embodiment.proprio.dim,), np.float32)
        for camera in embodiment.cameras:
            if f"{camera.name}_image" in observation.spaces:
                wanted[f"{camera.name}_image"] = ((camera.height, camera.width, 3), np.uint8)
        for key, (shape, dtype) in wanted.items():
            space = observation.spaces.get(key)
            good = isinstance(space, gym.spaces.Box) and space.shape == shape and space.dtype == dtype
            self.expect(good, f"observation '{key}' must be a {np.dtype(dtype)} Box of shape {shape}, found {space}")
        for key in self.keys:
            known = self.foreign or key in wanted or key == "object_state"
            self.expect(known, f"observation '{key}' is neither proprio, object_state nor an image of the embodiment")

    # -- values --------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> Any:
        first = self.seed if seed is None else seed
        return self.vector.reset(seed=[first + index for index in range(self.count)])

    def actions(self, *values: float) -> np.ndarray:
        """The same action in every environment; missing dimensions are 0 and the gripper stays open."""
        action = np.zeros((self.count, self.embodiment.action.dim), dtype=np.float32)
        action[:, -1] = 1.0
        action[:, : len(values)] = values[: action.shape[1]]
        return action

    def check_observation(self, observation: Observation, where: str) -> None:
        self.expect(isinstance(observation, dict), f"{where} must return a dict observation")
        self.expect(
            set(observation) == set(self.keys),
            f"{where} returned the keys {sorted(observation)}, the space has {sorted(self.keys)}",
        )
        for key in self.keys:
            space, value = self.vector.single_observation_space[key], observation[key]
            shape = (self.count, *space.shape)
            right = isinstance(value, np.ndarray) and value.dtype == space.dtype and value.shape == shape
            self.expect(right, f"{where}: '{key}' must be {space.dtype} of shape {space.shape}")
            if right and value.dtype.kind == "f":
                self.expect(bool(np.isfinite(value).all()), f"{where}: '{key}' is not finite")
            if right and key.endswith("_image"):
                self.expect(int(value.max()) > int(value.min()), f"{where}: '{key}' is one flat colour")

    def check_info(self, info: dict[str, Any], where: str) -> None:
        for key in INFO_KEYS:
            if key == "target" and self.foreign:
                continue
            self.expect(key in info, f"{where}: info lacks '{key}'")
        for key, kind in (("success", "b"), ("instruction", "OUT"), ("sim_fault", "OUT")):
            value = np.asarray(info.get(key, np.zeros(0)))
            good = value.shape == (self.count,) and value.dtype.kind in kind
            self.expect(good, f"{where}: info['{key}'] has the wrong type or shape")
            if kind == "OUT":
                self.expect(all(isinstance(item, str) for item in value), f"{where}: info['{key}'] must be text")
        self.expect(all(str(text).strip() for text in info.get("instruction", ())), f"{where}: empty instruction")
        for key in ("milestones", "contacts"):
            flags = info.get(key)
            good = isinstance(flags, dict) and all(
                np.asarray(flag).shape == (self.count,) and np.asarray(flag).dtype == bool
                for name, flag in flags.items()
                if not str(name).startswith("_")  # gymnasium's presence masks
            )
            self.expect(good, f"{where}: info['{key}'] must map names to bools")
        if self.foreign:
            return
        target = np.asarray(info.get("target", np.zeros(0)))
        good = target.shape == (self.count, len(TARGET_NAMES)) and target.dtype == np.float64
        self.expect(good, f"{where}: info['target'] must be float64 of shape ({len(TARGET_NAMES)},)")
        if good:
            self.expect(bool(np.isfinite(target).all()), f"{where}: info['target'] is not finite")

    def check_reset(self) -> None:
        observation, info = self.reset()
        self.check_observation(observation, "reset")
        self.check_info(info, "reset")

    def check_steps(self) -> None:
        observation, info = self.reset()
        generator = np.random.default_rng(self.seed)
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        for _ in range(5):
            kept += [(value, value.copy()) for value in observation.values()]
            if not self.foreign:
                kept.append((info["target"], info["target"].copy()))
            action = self.actions(*generator.uniform(-0.3, 0.3, 6)[: self.embodiment.action.dim - 1])
            given = action.copy()
            before = info.get("target")
            observation, reward, terminated, truncated, info = self.vector.step(action)
            self.expect(bool((action == given).all()), "step changed the caller's action")
            self.check_observation(observation, "step")
            self.check_info(info, "step")
            if not self.foreign:
                wanted = integrate_action(before, given, self.embodiment)
                moved = np.abs(wanted - info["target"]).max() < 1e-5
                self.expect(bool(moved), "info['target'] is not integrate_action of the previous one and the action")
            reward = np.asarray(reward)
            self.expect(reward.shape == (self.count,) and bool(np.isfinite(reward).all()), "rewards must be finite")
            for name, flag in (("terminated", terminated), ("truncated", truncated)):
                self.expect(np.asarray(flag).dtype == bool, f"{name} must be bool")
        intact = all(bool((value == copy).all()) for value, copy in kept)
        self.expect(intact, "arrays returned earlier changed during later steps: return copies")

    def check_bad_actions(self) -> None:
        self.reset()
        state = self.base.get_state() if self.deterministic and hasattr(self.base, "get_state") else None
        shape = self.env.action_space.shape
        good = self.actions()[0] if self.single else self.actions()
        nan, infinite, far = good.copy(), good.copy(), good.copy()
        nan.flat[0], infinite.flat[0], far.flat[0] = np.nan, np.inf, 1.5
        cases: dict[str, Any] = {
            "the wrong shape": np.zeros((*shape[:-1], shape[-1] + 1), dtype=np.float32),
            "text": np.full(shape, "0"),
            "booleans": np.zeros(shape, dtype=bool),
            "NaN": nan,
            "infinity": infinite,
        }
        if self.embodiment.action.mode == "ee_delta":
            cases["a value of 1.5"] = far
        for name, action in cases.items():
            try:
                self.env.step(action)
            except ActionError:
                continue
            except Exception as error:  # any other exception is the violation
                self.expect(False, f"an action with {name} must raise ActionError, not {type(error).__name__}: {error}")
            else:
                self.expect(False, f"an action with {name} must raise ActionError, and was accepted")
        if state is not None:
            untouched = np.array_equal(np.asarray(state), np.asarray(self.base.get_state()))
            self.expect(untouched, "a refused action changed the state")
        observation, *_ = self.vector.step(self.actions())
        self.check_observation(observation, "step after a refused action")

    def check_instruction(self) -> None:
        self.reset()
        text = "do something else entirely"
        if not callable(getattr(self.base, "set_instruction", None)):
            self.expect(False, "env.unwrapped.set_instruction(text) is missing")
            return
        self.base.set_instruction(text)
        *_, info = self.vector.step(self.actions())
        self.expect(all(str(item) == text for item in info["instruction"]), "set_instruction has no effect on info")
        _, info = self.reset()
        self.expect(all(str(item) != text for item in info["instruction"]), "reset keeps the previous instruction")

    def check_motion(self) -> None:
        if self.embodiment.action.mode != "ee_delta":
            return
        names = self.embodiment.proprio.names
        if not {"tcp_x", "tcp_r11", "gripper_opening"} <= set(names):
            return
        first, turn, finger = names.index("tcp_x"), names.index("tcp_r11"), names.index("gripper_opening")
        start = self.reset()[0]["proprio"].astype(float)
        for _ in range(6):
            self.vector.step(self.actions(0, 0.5, 0.5, 0, 0, 0.5))
        for _ in range(10):
            observation, *_ = self.vector.step(self.actions())
        end = observation["proprio"].astype(float)
        limits = self.embodiment.action.limits
        moved = end[:, first : first + 3] - start[:, first : first + 3]
        wanted = np.array([0, 3 * limits[1], 3 * limits[2]])
        self.expect(
            bool((np.abs(moved - wanted) < MOTION_TOLERANCE_M).all()),
            f"asked to move the TCP by {wanted.tolist()} m in the base frame, it moved by {moved[0].round(3).tolist()}",
        )
        before, after = (rotation.from_6d(value[:, turn : turn + 6]) for value in (start, end))
        difference = rotation.quaternion_multiply(after, rotation.quaternion_conjugate(before))
        turned = rotation.to_rotation_vector(difference)
        asked = np.array([0, 0, 3 * limits[5]])
        self.expect(
            bool((np.abs(turned - asked) < MOTION_TOLERANCE_RAD).all()),
            f"asked to turn the TCP by {asked.tolist()} rad in the base frame, it turned by "
            f"{turned[0].round(3).tolist()}",
        )
        opened = end[:, finger]
        close = self.actions()
        close[:, -1] = -1.0
        for _ in range(12):
            observation, *_ = self.vector.step(close)
        closed = observation["proprio"][:, finger]
        good = bool((opened > 0.8).all() and (closed < 0.2).all())
        self.expect(
            good, f"gripper opening is {opened[0]:.2f} when told to open and {closed[0]:.2f} when told to close"
        )

    def check_seeds(self) -> None:
        first, first_info = self.reset()
        moving = self.actions(0.2, -0.1, 0.3)
        first_next = self.vector.step(moving)[0]
        again, again_info = self.reset()
        if not self.deterministic:
            apart = float(np.abs(first["proprio"] - again["proprio"]).max())
            self.expect(apart < HOME_TOLERANCE, f"two resets differ by {apart:.3f} in proprio: the arm is not at home")
            return
        again_next = self.vector.step(moving)[0]
        for key in self.keys:
            self.expect(bool((first[key] == again[key]).all()), f"equal seeds give different '{key}' at reset")
            same = bool((first_next[key] == again_next[key]).all())
            self.expect(same, f"equal seeds and actions give different '{key}' after a step")
        pairs = zip(first_info["instruction"], again_info["instruction"], strict=True)
        self.expect(all(str(a) == str(b) for a, b in pairs), "equal seeds give different instructions")
        other, _ = self.reset(seed=self.seed + self.count)
        differs = any(bool((first[key] != other[key]).any()) for key in self.keys)
        self.expect(differs, "different seeds give the same initial condition")

    def check_state(self) -> None:
        self.reset()
        self.vector.step(self.actions(0.2, 0.1, -0.2))
        state = np.array(self.base.get_state())
        forward = self.actions(-0.3, 0.2, 0.1)
        first = self.vector.step(forward)[0]
        self.vector.step(forward)
        self.base.set_state(state)
        self.expect(np.array_equal(state, self.base.get_state()), "get_state after set_state is not bit-identical")
        again = self.vector.step(forward)[0]
        for key in self.keys:
            same = bool((first[key] == again[key]).all())
            self.expect(same, f"replaying from a state gives different '{key}'")

    def check_end(self) -> None:
        self.reset()
        horizon = self.base.task.horizon
        ended = np.zeros(self.count, dtype=bool)
        for step in range(1, horizon + 1):
            _, _, terminated, truncated, _ = self.vector.step(self.actions())
            early = truncated & ~ended
            self.expect(step == horizon or not early.any(), f"truncated at step {step}, before the horizon {horizon}")
            ended |= terminated | truncated
            if ended.all():
                break
        self.expect(bool(ended.all()), f"not truncated at the horizon of {horizon} steps")

    def check_timing(self) -> None:
        self.reset()
        self.vector.step(self.actions())
        steps = 20
        begin = time.monotonic_ns()
        for _ in range(steps):
            self.vector.step(self.actions())
        period = (time.monotonic_ns() - begin) * 1e-9 / steps
        wanted = self.embodiment.control_period_s
        self.expect(
            abs(period - wanted) < PERIOD_TOLERANCE * wanted,
            f"steps take {1000 * period:.1f} ms on average, the embodiment promises {1000 * wanted:.1f} ms",
        )

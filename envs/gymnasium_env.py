"""Any Gymnasium environment behind our interface, for robots that we know only from their data.

A policy trained on imported demonstrations acts in the environment that they come from. Nothing here knows any robot:
observations are matched to the keys of the data by name and shape, and actions are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from simtoreal.envs.action import check_action
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.env_observations import RENDER, ObservationMap
from simtoreal.envs.errors import ConfigError, closest
from simtoreal.envs.registration import find_spec
from simtoreal.envs.seeds import one_seed_each

# What environments call success in their info; without any of them, termination counts.
SUCCESS_KEYS = ("success", "is_success")
TERMINATED = "terminated"


@dataclass(frozen=True, kw_only=True)
class ForeignTask:
    """What our interface needs to know about a task that exists outside simtoreal.

    Attributes:
        name: Gymnasium id.
        horizon: control steps after which an episode is truncated.
        instruction: what to do, in words.
    """

    name: str
    horizon: int
    instruction: str


class GymnasiumVectorEnv(VectorEnv):  # type: ignore[misc]
    """N copies of a Gymnasium environment behind the interface of docs/interface.md, stepped one after the other.

    Observations are those of the data (see :class:`~simtoreal.envs.env_observations.ObservationMap`). Actions are the
    environment's own, clipped to its action space; recorded actions often exceed it a little, and recorders clip too.
    An episode ends in success as soon as the environment reports it, whether or not it ends there itself.

    Args:
        env_id: Gymnasium id, also as ``module:id``. If it is not registered yet, the installed packages that depend
            on gymnasium are imported until one of them registers it.
        num_envs: number of copies.
        embodiment: of the data; gives the dimensions of the action and the cameras.
        keys: observation keys to offer, with the shape of one step: ``(D,)`` or ``(height, width, 3)``.
        sources: key -> entries of the environment's observation joined by ``+``, or ``render``; for keys that cannot
            be matched by name or shape.
        success_key: entry of the environment's info that says success, or ``terminated``; by default the first one of
            ``SUCCESS_KEYS`` that there is, and ``terminated`` if there is none.
        horizon: control steps per episode; by default what the environment's registration says.
        instruction: what to do, in words.
        drawn: how many copies can draw, for :meth:`picture`: a software renderer may take 400 MB per copy.

    Raises:
        ConfigError: unknown id, no copies, no horizon, an action space that is not a vector of the right size, or an
            observation key that cannot be found.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        embodiment: Embodiment,
        keys: Mapping[str, tuple[int, ...]],
        sources: Mapping[str, str] | None = None,
        success_key: str = "",
        horizon: int | None = None,
        instruction: str = "",
        drawn: int = 0,
    ) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs is {num_envs}; expected at least 1")
        spec = find_spec(env_id)
        horizon = horizon or spec.max_episode_steps
        if not horizon:
            raise ConfigError(f"'{env_id}' says no maximal episode length; give one with --horizon")
        self.embodiment, self.num_envs, self.success_key = embodiment, num_envs, success_key
        self.task = ForeignTask(name=spec.id, horizon=int(horizon), instruction=instruction or f"solve {spec.id}")
        if any(source == RENDER for source in (sources or {}).values()):
            drawn = num_envs
        options = {"max_episode_steps": self.task.horizon}
        probe = gym.make(spec, **options)
        self.drawn = min(drawn, num_envs) if "rgb_array" in probe.metadata.get("render_modes", ()) else 0
        probe.close()
        modes = ["rgb_array"] * self.drawn + [None] * (num_envs - self.drawn)
        self.envs = [gym.make(spec, render_mode=mode, **options) for mode in modes]
        try:
            self._bounds = self._action_bounds(self.envs[0].action_space)
            self.observation_map = ObservationMap(
                self.envs[0].observation_space, keys, sources or {}, env_id, drawable=self.drawn > 0
            )
        except ConfigError:
            self.close()
            raise
        box = gym.spaces.Box
        single = {
            key: box(0, 255, shape, np.uint8) if len(shape) == 3 else box(-np.inf, np.inf, shape, np.float32)
            for key, shape in keys.items()
        }
        self.single_observation_space = gym.spaces.Dict(single)
        self.single_action_space = box(-np.inf, np.inf, (embodiment.action.dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._observation = {key: np.zeros((num_envs, *space.shape), space.dtype) for key, space in single.items()}
        self._ended = np.ones(num_envs, dtype=bool)
        self._success = np.zeros(num_envs, dtype=bool)
        self._reported = np.zeros(num_envs, dtype=bool)
        self._seeds = np.zeros(num_envs, dtype=np.int64)
        self._faults = np.full(num_envs, "", dtype=object)
        self._instructions = np.full(num_envs, self.task.instruction, dtype=object)
        self._started = False

    def _action_bounds(self, space: gym.Space[Any]) -> tuple[np.ndarray, np.ndarray]:
        dim = self.embodiment.action.dim
        if not isinstance(space, gym.spaces.Box) or space.shape != (dim,):
            raise ConfigError(
                f"'{self.task.name}' takes actions {space}, but the data of '{self.embodiment.name}' hold {dim} "
                "numbers per action. Give the environment that the data come from."
            )
        return space.low, space.high

    # Gymnasium interface ----------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin new episodes.

        Args:
            seed: one per copy, or an integer s for s, s+1, ...; None leaves it to the environment.
            options: ``reset_mask`` (N,) bool limits the reset to some copies; everything else is handed to the
                environments' own ``reset``.

        Raises:
            ConfigError: the mask or the number of seeds does not fit.
        """
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ConfigError(f"reset_mask must be bool of shape ({self.num_envs},), got {mask.dtype} {mask.shape}")
        if not self._started and not mask.all():
            raise ConfigError("the first reset must reset every environment; leave out reset_mask")
        seeds = one_seed_each(seed, self.num_envs)
        for slot in np.flatnonzero(mask):
            value = seeds[slot]
            observation, _ = self.envs[slot].reset(seed=value, options=options or None)
            self._seeds[slot] = -1 if value is None else value
            self._instructions[slot] = self.task.instruction
            self._ended[slot] = self._success[slot] = self._reported[slot] = False
            self._faults[slot] = ""
            self._take(slot, observation)
        self._started = True
        return self._observations(), self._info()

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every running copy by one control step; the others keep their last observation until they are reset.

        Args:
            actions: ``(N, A)`` in the environment's own units.

        Returns:
            Observation, the environment's own reward, terminated, truncated, info.

        Raises:
            ActionError: wrong shape or dtype, or not finite.
            ConfigError: an episode ended and its info never held ``success_key``.
        """
        if not self._started:
            raise ConfigError("call reset() before step()")
        actions = check_action(actions, (self.num_envs, self.embodiment.action.dim), bounded=False)
        actions = np.clip(actions, *self._bounds).astype(self.envs[0].action_space.dtype)
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, dtype=bool), np.zeros(self.num_envs, dtype=bool)
        for slot in np.flatnonzero(~self._ended):
            observation, reward, ended, cut, info = self.envs[slot].step(actions[slot])
            self._take(slot, observation)
            rewards[slot] = float(reward) if np.isfinite(reward) else 0.0
            self._success[slot] = self._succeeded(slot, bool(ended), info) and not self._faults[slot]
            terminated[slot] = (bool(ended) or self._success[slot]) and not self._faults[slot]
            truncated[slot] = (bool(cut) or bool(self._faults[slot])) and not terminated[slot]
            self._ended[slot] = terminated[slot] or truncated[slot]
            if self._ended[slot] and self.success_key and not self._reported[slot]:
                raise ConfigError(
                    f"--success-key {self.success_key}: the info of '{self.task.name}' never held it. "
                    f"{closest(self.success_key, [*map(str, info), TERMINATED])}"
                )
        return self._observations(), rewards, terminated, truncated, self._info()

    def close(self, **kwargs: Any) -> None:
        """Close every copy."""
        for env in self.envs:
            env.close()

    def set_instruction(self, text: str, mask: np.ndarray | None = None) -> None:
        """Change the language instruction of the copies where ``mask`` is true (default: all)."""
        self._instructions[np.ones(self.num_envs, bool) if mask is None else mask] = text

    def picture(self, slot: int) -> np.ndarray:
        """Return what a copy looks like now, uint8 ``(height, width, 3)``.

        Raises:
            ConfigError: the environment cannot draw, or this copy was not made to.
        """
        frame = self.envs[slot].render() if slot < self.drawn else None
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise ConfigError(f"'{self.task.name}' draws no pictures (render mode 'rgb_array'); use --videos 0")
        return frame.astype(np.uint8)

    @property
    def control_hz(self) -> float | None:
        """Rate of the environment's own steps, where it says one."""
        base = self.envs[0].unwrapped
        period = getattr(base, "dt", None)
        if isinstance(period, float) and period > 0:
            return 1.0 / period
        rate = self.envs[0].metadata.get("render_fps")
        return float(rate) if rate else None

    # Parts ------------------------------------------------------------------------------------------------

    def _take(self, slot: int, observation: Any) -> None:
        picture = self.picture(slot) if self.observation_map.draws else None
        for key, value in self.observation_map(observation, picture).items():
            self._observation[key][slot] = value
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                self._faults[slot] = "not_finite"

    def _succeeded(self, slot: int, ended: bool, info: Mapping[str, Any]) -> bool:
        if self.success_key == TERMINATED:
            self._reported[slot] = True
            return ended
        for key in (self.success_key,) if self.success_key else SUCCESS_KEYS:
            if key in info:
                self._reported[slot] = True
                return bool(np.all(info[key]))
        return ended and not self.success_key

    def _observations(self) -> dict[str, np.ndarray]:
        return {key: value.copy() for key, value in self._observation.items()}

    def _info(self) -> dict[str, Any]:
        return {
            "success": self._success.copy(),
            "milestones": {},
            "contacts": {},
            "instruction": self._instructions.copy(),
            "sim_fault": self._faults.copy(),
            "init_id": self._seeds.copy(),
        }

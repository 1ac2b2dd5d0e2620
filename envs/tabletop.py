"""One tabletop simulation behind :class:`gymnasium.Env`."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.utils import EzPickle

from simtoreal.envs.action import check_action
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.randomization import Randomization
from simtoreal.envs.rendering import PictureRenderer
from simtoreal.envs.rollout import index_info
from simtoreal.envs.scene_motion import SceneMotion
from simtoreal.envs.tabletop_vector import TabletopVectorEnv
from simtoreal.envs.task import TaskSpec


class TabletopEnv(gym.Env[dict[str, np.ndarray], np.ndarray], EzPickle):
    """A vector of one :class:`TabletopVectorEnv` without the leading axis; see there for arguments.

    Args:
        render_mode: ``"rgb_array"`` makes :meth:`render` return a 640x480 picture in the ``high`` profile.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        task: str | TaskSpec,
        *,
        embodiment: Embodiment | None = None,
        image_size: int = 64,
        render_profile: str = "fast",
        cameras: tuple[str, ...] = ("front", "wrist"),
        observe: str = "image",
        randomization: str | Randomization | None = None,
        motion: str | SceneMotion | None = None,
        record_state: bool = False,
        render_mode: str | None = None,
    ) -> None:
        EzPickle.__init__(
            self, task, embodiment=embodiment, image_size=image_size, render_profile=render_profile, cameras=cameras,
            observe=observe, randomization=randomization, motion=motion, record_state=record_state,
            render_mode=render_mode,
        )  # fmt: skip
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f"render_mode is '{render_mode}'; expected None or 'rgb_array'")
        self.vector = TabletopVectorEnv(
            task, 1, embodiment=embodiment, image_size=image_size, render_profile=render_profile, cameras=cameras,
            observe=observe, randomization=randomization, motion=motion, record_state=record_state,
        )  # fmt: skip
        self.render_mode = render_mode
        self.task, self.embodiment, self.model = self.vector.task, self.vector.embodiment, self.vector.model
        self.metadata = {**type(self).metadata, "render_fps": self.embodiment.control_hz}
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self._pictures: PictureRenderer | None = None

    @property
    def images_wanted(self) -> bool:
        """See docs/interface.md."""
        return self.vector.images_wanted

    @images_wanted.setter
    def images_wanted(self, wanted: bool) -> None:
        self.vector.images_wanted = wanted

    @property
    def data(self) -> mujoco.MjData:
        """A copy of the simulation's MjData."""
        return self.vector.batch.get_data(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; ``options={"init": state}`` starts from a state of :meth:`get_state`."""
        super().reset(seed=seed)
        chosen = int(self.np_random.integers(2**31)) if seed is None else seed
        options = dict(options or {})
        if "init" in options:
            options["init"] = np.asarray(options["init"])[None]
        observation, info = self.vector.reset(seed=[chosen], options=options)
        return index_info(observation, 0), _plain(index_info(info, 0))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Advance by one control step; see :meth:`TabletopVectorEnv.step`."""
        action = check_action(action, (self.embodiment.action.dim,))
        observation, reward, terminated, truncated, info = self.vector.step(action[None])
        flags = bool(terminated[0]), bool(truncated[0])
        return index_info(observation, 0), float(reward[0]), *flags, _plain(index_info(info, 0))

    def render(self, camera: str = "overview") -> np.ndarray | None:
        """Return a ``(480, 640, 3)`` uint8 RGB picture, or None without a render mode.

        Args:
            camera: ``"overview"``, or a camera of the embodiment; of the default ones, if it has none.

        Raises:
            ConfigError: unknown camera.
        """
        if self.render_mode is None:
            return None
        if self._pictures is None:
            self._pictures = PictureRenderer(self.task, self.embodiment)
        fields = self.vector.fields
        return self._pictures.render(fields["qpos"][0], fields["mocap_pos"][0], fields["mocap_quat"][0], camera)

    def get_state(self) -> np.ndarray:
        """Exact state ``(D,)`` float64; see :meth:`TabletopVectorEnv.get_state`."""
        return self.vector.get_state()[0]

    def set_state(self, state: np.ndarray) -> None:
        """Restore a state of :meth:`get_state`; replay from it is bit-identical."""
        self.vector.set_state(np.asarray(state)[None])

    def set_motion(self, motion: str | SceneMotion | None) -> None:
        """Choose how the scene moves in episodes that begin from now on."""
        self.vector.set_motion(motion)

    def set_instruction(self, text: str) -> None:
        """Change the language instruction from the next step on."""
        self.vector.set_instruction(text)

    def close(self) -> None:
        """Free the renderers."""
        self.vector.close()
        if self._pictures is not None:
            self._pictures.close()
            self._pictures = None


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    """Turn numpy scalars of a single environment's info into Python values."""
    plain: dict[str, Any] = {}
    for key, value in info.items():
        if isinstance(value, dict):
            plain[key] = _plain(value)
        else:
            plain[key] = value.item() if isinstance(value, np.generic) else value
    return plain

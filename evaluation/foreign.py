"""Evaluating a policy in the Gymnasium environment that its demonstrations come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simtoreal.data_collection.foreign_embodiment import is_foreign_task
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.gymnasium_env import GymnasiumVectorEnv
from simtoreal.envs.rollout import Observation
from simtoreal.evaluation.videos import EpisodeVideos
from simtoreal.policies.checkpoint import LoadedPolicy

# Videos play at most about this many frames per second; drawing is far slower than stepping.
_VIDEO_HZ = 30.0
# Episodes drawn per video wanted: a rare kind must not keep every episode being drawn.
_TRIES = 4
DRAWN_COPIES = 2


def environment_of(loaded: LoadedPolicy, env_id: str | None) -> str:
    """Return the Gymnasium id to evaluate in: the one given, or that of the policy's foreign task, or an empty text.

    Raises:
        ConfigError: the policy was trained on a foreign task without a known environment.
    """
    if env_id or not is_foreign_task(loaded.task):
        return env_id or ""
    if not loaded.task.get("env_id"):
        raise ConfigError(
            f"{loaded.folder} was trained on demonstrations of '{loaded.embodiment.name}', which simtoreal does not "
            "simulate; name its Gymnasium environment with --env"
        )
    return str(loaded.task["env_id"])


def parse_observations(words: Sequence[str]) -> dict[str, str]:
    """Return key -> source of texts such as ``state=observation+desired_goal``.

    Raises:
        ConfigError: a text is not KEY=ENTRY, or a key occurs twice.
    """
    sources: dict[str, str] = {}
    for word in words:
        key, separator, source = word.partition("=")
        if not separator or not key or not source or key in sources:
            raise ConfigError(f"--observations: '{word}' must be KEY=ENTRY or KEY=ENTRY+ENTRY, each key once")
        sources[key] = source
    return sources


def make_foreign_env(
    loaded: LoadedPolicy,
    env_id: str,
    num_envs: int,
    *,
    success_key: str = "",
    horizon: int | None = None,
    sources: Mapping[str, str] | None = None,
    drawn: int = 0,
) -> GymnasiumVectorEnv:
    """Return copies of a Gymnasium environment that offer what the policy reads.

    Args:
        loaded: the policy; its keys and their sizes come from its training data.
        env_id, num_envs, success_key, horizon, sources, drawn: see :class:`GymnasiumVectorEnv`.

    Raises:
        ConfigError: see :class:`GymnasiumVectorEnv`.
    """
    policy = loaded.policy
    cameras = {f"{camera.name}_image": (camera.height, camera.width, 3) for camera in loaded.embodiment.cameras}
    keys: dict[str, tuple[int, ...]] = {key: cameras[key] for key in policy.config.image_keys}
    keys |= {key: (policy.normalizer.dim(key),) for key in policy.config.state_keys}
    return GymnasiumVectorEnv(
        env_id,
        num_envs,
        embodiment=loaded.embodiment,
        keys=keys,
        sources=sources,
        success_key=success_key,
        horizon=horizon,
        instruction=str(loaded.task.get("instruction", "")),
        drawn=drawn,
    )


def rate_note(env: GymnasiumVectorEnv) -> list[str]:
    """Return a warning if the data and the environment disagree about the control rate."""
    theirs, ours = env.control_hz, env.embodiment.control_hz
    if theirs is None or abs(theirs - ours) <= 0.01 * ours:
        return []
    return [
        f"the data say {ours:g} control steps per second, '{env.task.name}' takes {theirs:g}: durations are those of "
        "the data. Import them again with --control-hz if that is wrong"
    ]


class DrawnVideos(EpisodeVideos):
    """Videos of a foreign environment as it draws itself.

    Args:
        env: can draw.
        folder: where the videos go.
        limit: number of videos of each kind; at most four times as many episodes are drawn for them.
    """

    def __init__(self, env: GymnasiumVectorEnv, folder: Path, limit: int) -> None:
        self.env = env
        self.stride = max(1, round(env.embodiment.control_hz / _VIDEO_HZ))
        super().__init__(folder, (), env.embodiment.control_hz / self.stride, limit)
        self.tries = 2 * _TRIES * self.limit
        self.steps: dict[int, int] = {}

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """Begin to keep the pictures of a slot, if videos are still wanted."""
        self.steps[slot] = 0
        self.clips.pop(slot, None)
        if self.tries > 0 and slot < self.env.drawn:
            self.tries -= 1
            super().on_reset(slot, episode, seed, observation, info)

    def _keep(self, slot: int, observation: Observation, info: dict[str, Any]) -> None:
        if self.steps[slot] % self.stride == 0:
            self.clips[slot].images.append([self.env.picture(slot)])
        self.steps[slot] += 1

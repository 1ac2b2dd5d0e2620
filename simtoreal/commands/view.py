"""Look at a task: a picture of initial conditions, a video of the expert, or MuJoCo's viewer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    import numpy as np

    from simtoreal.envs.tabletop import TabletopEnv

PICTURE_CONDITIONS = 6


@dataclass(frozen=True, kw_only=True)
class Config:
    """Drawn from outside with shadows and anti-aliasing, not as the policy's cameras see the scene."""

    task: tyro.conf.Positional[str]
    """Name of a task (simtoreal list tasks) or path of a task's yaml file."""
    output: Path | None = None
    """Picture (.png) of six initial conditions, or video (.mp4) of the expert; default: outputs/view/TASK.png."""
    seed: int = 0
    """First initial condition."""
    camera: str = "overview"
    """Where to look from: overview, front or wrist."""
    interactive: bool = False
    """Watch the expert in MuJoCo's viewer instead; needs a display. Close the window to stop."""

    def __post_init__(self) -> None:
        from simtoreal.envs.errors import ConfigError

        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; expected at least 0")
        if self.output is not None and self.output.suffix not in (".png", ".mp4"):
            raise ConfigError(f"--output is {self.output}; expected a name that ends in .png or .mp4")


def main(config: Config) -> None:
    """Write the file, or open the viewer."""
    from rich.console import Console

    from simtoreal.envs import load_task, make_env
    from simtoreal.envs.errors import ConfigError
    from simtoreal.envs.files import explained_disk_errors

    task = load_task(config.task)
    env = make_env(task, observe="state", render_mode="rgb_array")
    try:
        if config.interactive:
            show(env, config.seed)
            return
        output = config.output or Path("outputs/view") / f"{task.name}.png"
        with explained_disk_errors(output, ConfigError, "Choose another --output."):
            if output.suffix == ".png":
                picture(env, output, config.seed, config.camera)
                what = f"initial conditions {config.seed} to {config.seed + PICTURE_CONDITIONS - 1} of {task.name}"
            else:
                what = film(env, output, config.seed, config.camera)
        Console(markup=False).print(f"{what}: {output}", soft_wrap=True, highlight=False)
    finally:
        env.close()


def picture(env: TabletopEnv, output: Path, seed: int, camera: str) -> None:
    """Write a grid of initial conditions, each under its instruction."""
    import cv2

    from simtoreal.envs.files import atomic_path
    from simtoreal.envs.video import tile

    frames, labels = [], []
    for condition in range(seed, seed + PICTURE_CONDITIONS):
        _, info = env.reset(seed=condition)
        frames.append(_render(env, camera))
        labels.append(f"{condition}: {info['instruction']}")
    _, encoded = cv2.imencode(".png", tile(frames, columns=3, labels=labels)[:, :, ::-1])
    with atomic_path(output) as temporary:
        temporary.write_bytes(encoded.tobytes())


def film(env: TabletopEnv, output: Path, seed: int, camera: str) -> str:
    """Write a video of the expert's episode in real time and return what it shows."""
    from simtoreal.data_collection.expert import ScriptedExpert
    from simtoreal.envs.rollout import Listener, rollout
    from simtoreal.envs.video import write_video

    frames: list[np.ndarray] = []

    class Filming(Listener):
        """Draws the scene after every step."""

        def on_reset(self, *_: object) -> None:
            """See :class:`Listener`."""
            frames.append(_render(env, camera))

        def on_step(self, *_: object) -> None:
            """See :class:`Listener`."""
            frames.append(_render(env, camera))

    expert = ScriptedExpert(env.task, env.embodiment)
    result = rollout(env, expert, [seed], listeners=[Filming()])[0]
    write_video(output, frames, env.embodiment.control_hz)
    outcome = "success" if result.success else result.failure
    return f"expert on '{result.instruction}', initial condition {seed}, {outcome} after {result.duration_s:.1f} s"


def _render(env: TabletopEnv, camera: str) -> np.ndarray:
    image = env.render(camera)
    if image is None:
        raise ValueError("the environment was made without render_mode='rgb_array'")
    return image


def show(env: TabletopEnv, seed: int) -> None:
    """Run the expert, one initial condition after the other, in MuJoCo's viewer until it is closed.

    Raises:
        ConfigError: there is no display.
    """
    import itertools
    import os
    import sys
    import time

    import mujoco
    import mujoco.viewer

    from simtoreal.data_collection.expert import ScriptedExpert
    from simtoreal.envs.errors import ConfigError
    from simtoreal.envs.rollout import Listener, rollout

    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError("--interactive needs a display, and there is none. Use --output VIEW.mp4 instead.")
    data = mujoco.MjData(env.model)
    with mujoco.viewer.launch_passive(env.model, data) as viewer:

        class Showing(Listener):
            """Copies the simulation's state into the viewer, in real time."""

            def draw(self) -> None:
                """Show the current state for one control period."""
                fields = env.vector.fields
                with viewer.lock():
                    data.qpos[:] = fields["qpos"][0]
                    data.mocap_pos[:], data.mocap_quat[:] = fields["mocap_pos"][0], fields["mocap_quat"][0]
                    mujoco.mj_forward(env.model, data)
                viewer.sync()
                time.sleep(env.embodiment.control_period_s)

            def on_reset(self, *_: object) -> None:
                """See :class:`Listener`."""
                self.draw()

            def on_step(self, *_: object) -> None:
                """See :class:`Listener`."""
                self.draw()

        expert = ScriptedExpert(env.task, env.embodiment)
        for condition in itertools.count(seed):
            if not viewer.is_running():
                return
            rollout(env, expert, [condition], listeners=[Showing()], stop=lambda: not viewer.is_running())

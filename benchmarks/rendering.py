"""How fast 64-pixel images are drawn: the tiled fast profile against MuJoCo's default Renderer, same scene.

LP_NUM_THREADS=1 python benchmarks/rendering.py
"""

from __future__ import annotations

import time

import numpy as np
from default_rendering import default_scene
from interleaved import read_no_flags, speed_arms, speed_headline, time_rounds, write_benchmark

from simtoreal.envs import make_vector_env

TASK, COUNT, SIZE, ROUNDS = "pick_place", 32, 64, 9
DEFAULT_FRAMES = 16


def main() -> None:
    """Run and store the measurement."""
    begin = time.perf_counter()
    env = make_vector_env(TASK, COUNT, image_size=SIZE)
    env.reset(seed=0)
    everyone = np.arange(COUNT)

    def tiled() -> None:
        env._draw(everyone)

    _, data, renderer = default_scene(env, SIZE)

    def default() -> None:
        for index in range(DEFAULT_FRAMES):
            renderer.update_scene(data, camera=("front", "wrist")[index % 2])
            renderer.render()

    arms = {"TabletopVectorEnv": tiled, "mujoco.Renderer": default}
    seconds = time_rounds(arms, ROUNDS)
    units = {"TabletopVectorEnv": 2.0 * COUNT, "mujoco.Renderer": float(DEFAULT_FRAMES)}
    headline = speed_headline("frames/s", seconds, units, "TabletopVectorEnv", "mujoco.Renderer")
    path = write_benchmark(
        "rendering",
        "How much faster are 64-pixel images drawn than by MuJoCo's default Renderer on the same scene?",
        headline,
        speed_arms(seconds, units),
        seconds=time.perf_counter() - begin,
        seeds=[0],
        notes=(
            f"{TASK}, {SIZE}x{SIZE} pixels, two cameras, {COUNT} simulations in one framebuffer. The default Renderer "
            "keeps MuJoCo's default quality (4096-pixel shadow map, 4x multisampling, reflections); the images differ, "
            "which is why the render profile is part of the embodiment."
        ),
    )
    print(f"{headline['ratio']:.1f}x mujoco.Renderer ({headline['ours']:.0f} frames/s); stored in {path}")


if __name__ == "__main__":
    read_no_flags(__doc__)
    main()

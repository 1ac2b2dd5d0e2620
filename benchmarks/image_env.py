"""How fast an image environment steps: ours against a loop with gymnasium-style default rendering, same scene.

    LP_NUM_THREADS=1 python benchmarks/image_env.py

The peer does what gymnasium's MuJoCo environments do per step: ``mj_step``, then ``mujoco.Renderer`` per camera
with default quality, then a dictionary of copies; one environment at a time.
"""

from __future__ import annotations

import time

import numpy as np
from default_rendering import default_scene
from interleaved import read_no_flags, speed_arms, speed_headline, time_rounds, write_benchmark

from simtoreal.envs import make_vector_env

TASK, COUNT, SIZE, STEPS, ROUNDS = "pick_place", 16, 64, 8, 9
PEER_STEPS = 6


def main() -> None:
    """Run and store the measurement."""
    import mujoco  # after simtoreal, which chooses EGL for mujoco.Renderer too

    begin = time.perf_counter()
    rng = np.random.default_rng(0)
    env = make_vector_env(TASK, COUNT, image_size=SIZE, threads=0)
    env.reset(seed=0)
    actions = rng.uniform(-1, 1, (STEPS, COUNT, 7)).astype(np.float32)

    def ours() -> None:
        for action in actions:
            env.step(action)

    model, data, renderer = default_scene(env, SIZE)

    def peer() -> None:
        for _ in range(PEER_STEPS):
            data.ctrl[:3] += rng.uniform(-0.01, 0.01, 3)
            mujoco.mj_step(model, data, nstep=env.substeps)
            observation = {"qpos": data.qpos.copy(), "qvel": data.qvel.copy()}
            for camera in ("front", "wrist"):
                renderer.update_scene(data, camera=camera)
                observation[camera] = renderer.render()

    arms = {"TabletopVectorEnv": ours, "default rendering loop": peer}
    seconds = time_rounds(arms, ROUNDS)
    units = {"TabletopVectorEnv": float(STEPS * COUNT), "default rendering loop": float(PEER_STEPS)}
    headline = speed_headline("control steps/s", seconds, units, "TabletopVectorEnv", "default rendering loop")
    path = write_benchmark(
        "image_env",
        "How much faster does an image environment (physics and two 64-pixel cameras) step than a default loop?",
        headline,
        speed_arms(seconds, units),
        seconds=time.perf_counter() - begin,
        seeds=[0],
        notes=f"{TASK}, {COUNT} simulations, all physics threads; the peer steps one simulation at a time.",
    )
    print(f"{headline['ratio']:.1f}x the default loop ({headline['ours']:.0f} control steps/s); stored in {path}")


if __name__ == "__main__":
    read_no_flags(__doc__)
    main()

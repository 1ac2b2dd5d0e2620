"""How fast 64 state simulations step: TabletopVectorEnv, SyncVectorEnv of the same environment, raw mj_step.

    python benchmarks/vector_env.py

One physics thread on every side, random actions. The raw loop steps 64 MjData of the same model with the same
controls through ``mujoco.mj_step(model, data, nstep)`` and builds no observation.
"""

from __future__ import annotations

import time

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from interleaved import read_no_flags, speed_arms, speed_headline, time_rounds, write_benchmark

from simtoreal.envs import make_env, make_vector_env

TASK, COUNT, STEPS, ROUNDS = "pick_place", 64, 25, 11


def main() -> None:
    """Run and store the measurement."""
    begin = time.perf_counter()
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, COUNT, 7)).astype(np.float32)
    ours = make_vector_env(TASK, COUNT, observe="state")
    constructors = [lambda: gym.wrappers.OrderEnforcing(make_env(TASK, observe="state"))] * COUNT
    peer = SyncVectorEnv(constructors, autoreset_mode=AutoresetMode.DISABLED)
    data = [mujoco.MjData(ours.model) for _ in range(COUNT)]
    controls = np.zeros((STEPS, COUNT, ours.model.nu))

    # Every run of an arm starts from the same state; the resets are outside what is counted.
    def reset() -> None:
        ours.reset(seed=0)
        peer.reset(seed=0)
        size = mujoco.mj_stateSize(ours.model, int(mujoco.mjtState.mjSTATE_INTEGRATION))
        for single, state in zip(data, ours.get_state()[:, :size], strict=True):
            mujoco.mj_setState(ours.model, single, state, int(mujoco.mjtState.mjSTATE_INTEGRATION))

    ours.reset(seed=0)
    for step, action in enumerate(actions):
        ours.step(action)
        controls[step] = ours.fields["ctrl"]

    def vector() -> None:
        for action in actions:
            ours.step(action)

    def sync() -> None:
        for action in actions:
            peer.step(action)

    def raw() -> None:
        for control in controls:
            for single, value in zip(data, control, strict=True):
                single.ctrl[:] = value
                mujoco.mj_step(ours.model, single, nstep=ours.substeps)

    arms = {"TabletopVectorEnv": vector, "SyncVectorEnv": sync, "raw mj_step": raw}
    seconds = time_rounds(arms, ROUNDS, prepare=reset)
    units = dict.fromkeys(arms, float(COUNT * STEPS))
    headline = speed_headline("control steps/s", seconds, units, "TabletopVectorEnv", "SyncVectorEnv")
    of_raw = speed_headline("control steps/s", seconds, units, "TabletopVectorEnv", "raw mj_step")
    path = write_benchmark(
        "vector_env",
        "How much faster do 64 batched state simulations step than gymnasium's SyncVectorEnv of the same environment?",
        headline,
        [
            *speed_arms(seconds, units),
            {
                "name": "TabletopVectorEnv / raw mj_step (ratio)",
                "value": of_raw["ratio"],
                "interval": of_raw["interval"],
                "n": of_raw["n"],
            },
        ],
        seconds=time.perf_counter() - begin,
        seeds=[0],
        notes=(
            f"{TASK}, {COUNT} simulations, one thread, {ours.substeps} substeps per control step. Raw mj_step builds "
            "no observations, rewards or checks; intervals of ratios are the middle 80 % of rounds."
        ),
    )
    print(f"{headline['ratio']:.2f}x SyncVectorEnv, {of_raw['ratio']:.3f} of raw mj_step; stored in {path}")


if __name__ == "__main__":
    read_no_flags(__doc__)
    main()

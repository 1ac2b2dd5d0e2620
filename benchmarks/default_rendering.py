"""The peer of the rendering benchmarks: MuJoCo's own Renderer with its default quality, on our scene."""

from __future__ import annotations

from typing import Any

from simtoreal.envs.scene import build_model
from simtoreal.envs.tabletop_vector import TabletopVectorEnv

QUALITY = ("shadowsize", "offsamples", "numslices", "numstacks", "numquads")


def default_scene(env: TabletopVectorEnv, size: int) -> tuple[Any, Any, Any]:
    """Return model, data and ``mujoco.Renderer`` of the state of the first simulation.

    Args:
        env: after its reset.
        size: height and width in pixels.
    """
    import mujoco  # after simtoreal, which chooses EGL for mujoco.Renderer too

    model = build_model(env.task, env.embodiment)
    fresh = mujoco.MjSpec().visual.quality
    for name in QUALITY:
        setattr(model.vis.quality, name, getattr(fresh, name))
    model.light_castshadow[:] = 1
    data = mujoco.MjData(model)
    data.qpos[:] = env.fields["qpos"][0]
    data.mocap_pos[:] = env.fields["mocap_pos"][0]
    data.ctrl[:] = env.fields["ctrl"][0]
    mujoco.mj_forward(model, data)
    return model, data, mujoco.Renderer(model, size, size)

"""Offscreen rendering: many small images of many simulations at once, or single large pictures."""

from __future__ import annotations

import atexit
import dataclasses
import os
import weakref
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import mujoco
import numpy as np

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, MissingDependencyError, closest
from simtoreal.envs.panda import panda_cameras
from simtoreal.envs.scene import build_model
from simtoreal.envs.task import TaskSpec

MAX_GEOMS = 200
MAX_TILES = 64
# Derived fields of MjData that drawing reads; per simulation they are copied into one scratch MjData.
DRAWN_FIELDS = ("geom_xpos", "geom_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir")
_COSTLY_EFFECTS = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_HAZE")
_OVERVIEW = {"azimuth": 145.0, "elevation": -22.0, "distance": 1.45, "lookat": (0.38, 0.0, 0.2)}


class _Canvas:
    """An OpenGL context with one framebuffer, a scene and pixels."""

    def __init__(self, model: mujoco.MjModel, height: int, width: int, profile: str) -> None:
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        try:
            self.context = _context_type()(width, height)
            self.context.make_current()
            self.renderer = mujoco.MjrContext(model, int(mujoco.mjtFontScale.mjFONTSCALE_100))
        except Exception as error:
            raise MissingDependencyError(
                f"cannot create an offscreen OpenGL context ({type(error).__name__}: {error}). "
                "Install EGL with 'apt-get install -y libegl1 libgl1' and check with 'simtoreal doctor'."
            ) from error
        # At exit contexts must go before mujoco shuts EGL down. What was registered last runs first, and weakref may
        # have registered its own end before mujoco was imported.
        self.finalizer = weakref.finalize(self, _free, self.renderer, self.context)
        self.finalizer.atexit = False
        atexit.register(self.finalizer)
        mujoco.mjr_setBuffer(int(mujoco.mjtFramebuffer.mjFB_OFFSCREEN), self.renderer)
        self.scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        if profile == "fast":
            for flag in _COSTLY_EFFECTS:
                self.scene.flags[int(getattr(mujoco.mjtRndFlag, flag))] = 0
        self.options = mujoco.MjvOption()
        self.options.sitegroup[:] = 0
        self.pixels = np.zeros((height, width, 3), dtype=np.uint8)

    def draw(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: mujoco.MjvCamera, rectangle: mujoco.MjrRect
    ) -> None:
        mujoco.mjv_updateScene(model, data, self.options, None, camera, int(mujoco.mjtCatBit.mjCAT_ALL), self.scene)
        mujoco.mjr_render(rectangle, self.scene, self.renderer)

    def read(self) -> np.ndarray:
        height, width = self.pixels.shape[:2]
        mujoco.mjr_readPixels(self.pixels, None, mujoco.MjrRect(0, 0, width, height), self.renderer)
        return self.pixels

    def close(self) -> None:
        atexit.unregister(self.finalizer)
        self.finalizer()


def _context_type() -> Any:
    """OpenGL context class; mujoco.GLContext is fixed when mujoco is imported, possibly before our default is set."""
    if os.environ.get("MUJOCO_GL") == "egl":
        from mujoco.egl import GLContext

        return GLContext
    return mujoco.GLContext


def _free(renderer: mujoco.MjrContext, context: Any) -> None:
    renderer.free()
    context.free()


def fixed_camera(model: mujoco.MjModel, name: str) -> mujoco.MjvCamera:
    """Return the handle of a camera of the model."""
    camera = mujoco.MjvCamera()
    camera.type = int(mujoco.mjtCamera.mjCAMERA_FIXED)
    camera.fixedcamid = model.camera(name).id
    return camera


class BatchRenderer:
    """Draws every camera of every simulation into the tiles of one framebuffer.

    Reading many images back at once avoids one pipeline stall per image, which costs as much as drawing.

    Args:
        model: scene model; drawing works on a private copy, whose visual fields may differ per simulation.
        embodiment: gives cameras and render profile.
        num_envs: number of simulations.
    """

    def __init__(self, model: mujoco.MjModel, embodiment: Embodiment, num_envs: int) -> None:
        import copy

        self.model = copy.copy(model)
        self.data = mujoco.MjData(self.model)
        self.specs = embodiment.cameras
        self.tile_height = max(camera.height for camera in self.specs)
        self.tile_width = max(camera.width for camera in self.specs)
        tiles = min(num_envs * len(self.specs), MAX_TILES)
        self.columns = int(np.ceil(np.sqrt(tiles)))
        self.rows = int(np.ceil(tiles / self.columns))
        shape = self.rows * self.tile_height, self.columns * self.tile_width
        self.canvas = _Canvas(self.model, *shape, embodiment.render_profile)
        self.cameras = [fixed_camera(self.model, camera.name) for camera in self.specs]
        self.targets = [getattr(self.data, name) for name in DRAWN_FIELDS]

    def render(
        self,
        fields: Mapping[str, np.ndarray],
        simulations: np.ndarray,
        overrides: Mapping[str, np.ndarray],
    ) -> list[np.ndarray]:
        """Draw the given simulations.

        Args:
            fields: ``DRAWN_FIELDS`` with a leading axis of all simulations.
            simulations: indices to draw.
            overrides: visual MjModel fields (dotted names allowed) with a leading axis of all simulations.

        Returns:
            Per camera ``(len(simulations), H, W, 3)`` uint8 RGB.
        """
        self.canvas.context.make_current()
        images = [np.empty((len(simulations), c.height, c.width, 3), dtype=np.uint8) for c in self.specs]
        sources = [
            np.reshape(fields[name], (len(fields[name]), *t.shape))
            for name, t in zip(DRAWN_FIELDS, self.targets, strict=True)
        ]
        model_fields = [(attrgetter(name)(self.model), values) for name, values in overrides.items()]
        pending: list[tuple[int, int, int, int]] = []
        for row, simulation in enumerate(simulations):
            for target, source in zip(self.targets, sources, strict=True):
                target[:] = source[simulation]
            for field, values in model_fields:
                field[:] = values[simulation]
            for index, camera in enumerate(self.specs):
                tile = len(pending)
                left = (tile % self.columns) * self.tile_width
                bottom = (tile // self.columns) * self.tile_height
                rectangle = mujoco.MjrRect(left, bottom, camera.width, camera.height)
                self.canvas.draw(self.model, self.data, self.cameras[index], rectangle)
                pending.append((index, row, left, bottom))
                if len(pending) == self.rows * self.columns:
                    self._collect(pending, images)
        if pending:
            self._collect(pending, images)
        return images

    def _collect(self, pending: list[tuple[int, int, int, int]], images: list[np.ndarray]) -> None:
        pixels = self.canvas.read()
        for index, row, left, bottom in pending:
            camera = self.specs[index]
            # OpenGL rows run from the bottom up.
            images[index][row] = pixels[bottom : bottom + camera.height, left : left + camera.width][::-1]
        pending.clear()

    def close(self) -> None:
        """Free the OpenGL context."""
        self.canvas.close()


class PictureRenderer:
    """Large pictures of a task's scene in the ``high`` profile, for people.

    Args:
        task: the task whose scene is drawn.
        embodiment: its robot and cameras; the default cameras, if it has none.
        height, width: pixels.
    """

    def __init__(self, task: TaskSpec, embodiment: Embodiment, height: int = 480, width: int = 640) -> None:
        cameras = embodiment.cameras or panda_cameras()
        self.model = build_model(task, dataclasses.replace(embodiment, cameras=cameras, render_profile="high"))
        self.data = mujoco.MjData(self.model)
        self.canvas = _Canvas(self.model, height, width, "high")
        overview = mujoco.MjvCamera()
        overview.azimuth, overview.elevation = _OVERVIEW["azimuth"], _OVERVIEW["elevation"]
        overview.distance, overview.lookat[:] = _OVERVIEW["distance"], _OVERVIEW["lookat"]
        self.cameras: dict[str, Any] = {"overview": overview}
        for index in range(self.model.ncam):
            name = self.model.camera(index).name
            self.cameras[name] = fixed_camera(self.model, name)

    def render(
        self, qpos: np.ndarray, mocap_pos: np.ndarray, mocap_quat: np.ndarray, camera: str = "overview"
    ) -> np.ndarray:
        """Return ``(H, W, 3)`` uint8 RGB of a state of the task's model.

        Raises:
            ConfigError: unknown camera.
        """
        if camera not in self.cameras:
            raise ConfigError(f"unknown camera '{camera}'. {closest(camera, self.cameras)}")
        self.data.qpos[:] = qpos
        self.data.mocap_pos[:], self.data.mocap_quat[:] = mocap_pos, mocap_quat
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        self.canvas.context.make_current()
        height, width = self.canvas.pixels.shape[:2]
        self.canvas.draw(self.model, self.data, self.cameras[camera], mujoco.MjrRect(0, 0, width, height))
        return self.canvas.read()[::-1].copy()

    def close(self) -> None:
        """Free the OpenGL context."""
        self.canvas.close()

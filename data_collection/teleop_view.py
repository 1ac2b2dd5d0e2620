"""What an operator of the simulation sees: the cameras of the embodiment, larger than they are recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading

import numpy as np

from simtoreal.data_collection.teleop_session import Board
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.rendering import DRAWN_FIELDS, BatchRenderer
from simtoreal.envs.tabletop import TabletopEnv

CLOSE_TIMEOUT_S = 5.0
NICE = 10


class EnlargedView:
    """Draws the scene again in a thread of its own, as often as it can, so that the control loop never waits for it.

    A person who demonstrates on a real table sees it with their own eyes. The images that are recorded, which a policy
    will have to do with, may be 64 pixels wide, too few to place a cube.

    Args:
        env: the simulation, with images.
        size: height of the pictures in pixels; the width follows from each camera.
        board: where they are posted.
    """

    def __init__(self, env: TabletopEnv, size: int, board: Board) -> None:
        self._env, self._board = env, board
        self._embodiment = _enlarged(env.embodiment, size)
        self._scene: dict[str, np.ndarray] | None = None
        self._looks: dict[str, np.ndarray] = {}
        self._lock, self._changed, self._closing = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._draw, name="teleop-view", daemon=True)
        self._thread.start()

    def show(self) -> None:
        """Draw the scene as it is now, soon; called by the thread that steps the environment."""
        fields, looks = self._env.vector.drawn_scene(np.array([0]))
        scene = {name: np.array(fields[name]) for name in DRAWN_FIELDS}
        looks = {name: np.array(value) for name, value in looks.items()}
        with self._lock:
            self._scene, self._looks = scene, looks
        self._changed.set()

    def close(self) -> None:
        """Stop drawing."""
        self._closing = True
        self._changed.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _draw(self) -> None:
        # Pictures may come late, the operator's commands may not.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        renderer = BatchRenderer(self._env.model, self._embodiment, 1)
        names = [camera.name for camera in self._embodiment.cameras]
        try:
            while True:
                self._changed.wait()
                self._changed.clear()
                if self._closing:
                    return
                with self._lock:
                    scene, looks = self._scene, self._looks
                if scene is not None:
                    images = renderer.render(scene, np.array([0]), looks)
                    self._board.post_frames({name: image[0] for name, image in zip(names, images, strict=True)})
        finally:
            renderer.close()


def _enlarged(embodiment: Embodiment, size: int) -> Embodiment:
    cameras = tuple(
        dataclasses.replace(camera, height=size, width=round(camera.width * size / camera.height))
        for camera in embodiment.cameras
    )
    return dataclasses.replace(embodiment, cameras=cameras, render_profile="high")

"""Action labels of demonstrations in a moving scene, as seen from the scene.

In a MOVE demonstration the actions that follow the current one also follow the scene, which goes on moving. A policy
that predicts chunks of actions would learn to aim at where things will be, in random directions, and misses things
that stand still (methods.md, card 1.6: aiming bias). Seen from the moving object the same demonstration is one of a
scene at rest: what an action owes to the scene's displacement in the step before, which the demonstrator saw, is
subtracted from it, and what is left is what would have been done had everything stood still. This assumes a
demonstrator who goes along with the scene, as :class:`~simtoreal.data_collection.expert.ScriptedExpert` and people
do; one who lags behind teaches a distance to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simtoreal.data_collection.episode import EpisodeInfo, read_episode
from simtoreal.envs.embodiment import Embodiment

COLUMN = "scene_motion"


def scene_displacements(episodes: Sequence[EpisodeInfo], embodiment: Embodiment) -> list[np.ndarray] | None:
    """Displacement of the scene during every step, in units of the action, or None if nothing ever moved.

    Before the first touch only the manipulated object moves and afterwards only the target, so that there is one
    displacement to relate the hand to; see :class:`~simtoreal.envs.scene_motion.SceneMotion`.

    Returns:
        One ``(T, A)`` float32 array per episode: x, y and the rotation about z; other dimensions are 0.
    """
    if not any(COLUMN in episode.columns for episode in episodes):
        return None
    names = list(embodiment.action.names)
    columns = {"dx": "_vx_m_s", "dy": "_vy_m_s", "drz": "_turn_rad_s"}
    found = []
    for episode in episodes:
        displacement = np.zeros((episode.steps, embodiment.action.dim), dtype=np.float32)
        if COLUMN in episode.columns:
            logged = read_episode(Path(str(episode.path)), [f"step/{COLUMN}"])[1][f"step/{COLUMN}"]
            for name, ending in columns.items():
                index = names.index(name)
                rates = [logged[:, i] for i, column in enumerate(episode.columns[COLUMN]) if column.endswith(ending)]
                per_unit = embodiment.control_period_s / embodiment.action.limits[index]
                displacement[:, index] = np.sum(rates, axis=0) * per_unit if rates else 0.0
        found.append(displacement)
    return found

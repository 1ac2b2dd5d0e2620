"""Action labels of demonstrations in a moving scene, as seen from the scene.

In a MOVE demonstration the actions that follow the current one also follow the scene, which goes on moving. A policy
that predicts chunks of actions would learn to aim at where things will be, in random directions, and misses things
that stand still (methods.md, card 1.6: aiming bias). Seen from the moving object the same demonstration is one of a
scene at rest: what an action owes to the scene's displacement in the step before, which the demonstrator saw, is
subtracted from it, and what is left is what would have been done had everything stood still.

This is right for a demonstrator who goes along with the scene within a step, as
:class:`~simtoreal.data_collection.expert.ScriptedExpert` does, and only its episodes are corrected. How far people lag
behind has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simtoreal.data_collection.episode import EpisodeInfo, read_episode
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError

COLUMN = "scene_motion"


def scene_displacements(episodes: Sequence[EpisodeInfo], embodiment: Embodiment) -> list[np.ndarray] | None:
    """Displacement of the scene during every step, in units of the action, or None if nothing ever moved.

    Before the first touch only the manipulated object moves and afterwards only the target, so that there is one
    displacement to relate the hand to; see :class:`~simtoreal.envs.scene_motion.SceneMotion`. Episodes of other sources
    than the scripted expert count as scenes at rest.

    Returns:
        One ``(T, A)`` float32 array per episode: x, y and the rotation about z; other dimensions are 0.

    Raises:
        DatasetError: an episode of a moving scene lacks the record of its motion.
    """
    corrected = [episode.source == "expert" and "motion" in episode.extra for episode in episodes]
    if not any(corrected) or embodiment.action.mode != "ee_delta":
        return None
    names = list(embodiment.action.names)
    columns = {"dx": "_vx_m_s", "dy": "_vy_m_s", "drz": "_turn_rad_s"}
    found = []
    for episode, moved in zip(episodes, corrected, strict=True):
        displacement = np.zeros((episode.steps, embodiment.action.dim), dtype=np.float32)
        if moved:
            if COLUMN not in episode.columns:
                raise DatasetError(
                    f"{episode.path}: was collected in a moving scene, but does not say how it moved (step/{COLUMN} is "
                    "missing; some formats cannot carry it). Train with --no-scene-frame or --mask static."
                )
            logged = read_episode(Path(str(episode.path)), [f"step/{COLUMN}"])[1][f"step/{COLUMN}"]
            for name, ending in columns.items():
                index = names.index(name)
                rates = [logged[:, i] for i, column in enumerate(episode.columns[COLUMN]) if column.endswith(ending)]
                per_unit = embodiment.control_period_s / embodiment.action.limits[index]
                displacement[:, index] = np.sum(rates, axis=0) * per_unit if rates else 0.0
        found.append(displacement)
    return found


def relate_to_scene(actions: np.ndarray, displacement: Sequence[np.ndarray]) -> np.ndarray:
    """Subtract from every action the displacement of the scene in the step before, which it answers.

    Args:
        actions: ``(N, A)`` of all episodes, in [-1, 1].
        displacement: one ``(T, A)`` array per episode, see :func:`scene_displacements`.

    Returns:
        ``(N, A)`` float32, kept in [-1, 1].
    """
    seen = [np.concatenate([np.zeros_like(part[:1]), part[:-1]]) for part in displacement]
    return np.clip(actions - np.concatenate(seen), -1.0, 1.0).astype(np.float32)

"""Large pictures of a simulated episode from outside, beside what the policy's cameras saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs import make_env
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import parse_task
from simtoreal.envs.video import write_video


class OutsideView:
    """Draws recorded simulation states in the ``high`` render profile, about twenty per second on one core.

    Args:
        task: name, path or specification of the task that the states belong to.
    """

    def __init__(self, task: str | TaskSpec) -> None:
        self.env = make_env(task, observe="state", render_mode="rgb_array")

    def frames(self, states: Sequence[np.ndarray], images: Sequence[Sequence[np.ndarray]]) -> Iterator[np.ndarray]:
        """Yield one ``(480, W, 3)`` picture per step.

        Args:
            states: simulation state ``(D,)`` of each step.
            images: the cameras' images of each step, shown in a column beside the picture.
        """
        for state, cameras in zip(states, images, strict=True):
            self.env.set_state(state)
            picture = self.env.render()
            if picture is None:
                raise ValueError("the environment was made without a render mode")
            yield beside(picture, cameras)

    def close(self) -> None:
        """Free the renderer."""
        self.env.close()


def beside(picture: np.ndarray, cameras: Sequence[np.ndarray]) -> np.ndarray:
    """Put camera images in a column to the right of a picture, enlarged without smoothing to fill its height."""
    import cv2

    if not len(cameras):
        return picture
    edge = picture.shape[0] // len(cameras)
    column = np.zeros((picture.shape[0], edge, 3), np.uint8)
    for index, image in enumerate(cameras):
        enlarged = cv2.resize(image, (edge, edge), interpolation=cv2.INTER_NEAREST)
        column[index * edge : (index + 1) * edge] = enlarged
    return np.concatenate([picture, np.full((picture.shape[0], 4, 3), 16, np.uint8), column], axis=1)


def has_drawable_success(dataset_folder: Path) -> bool:
    """Whether :func:`write_demonstration` can show an episode: foreign and real ones have no states to draw.

    Raises:
        DatasetError: the dataset is damaged.
    """
    dataset = Dataset.open(dataset_folder)
    episode = next((episode for episode in dataset.episodes if episode.success), None)
    return episode is not None and dataset.read(episode, ["states"])["states"].shape[1] > 0


def write_demonstration(dataset_folder: Path, path: Path) -> Path:
    """Write a video of the first successful demonstration of a dataset made in simulation.

    Raises:
        DatasetError: the dataset is damaged, holds no success, or has no simulation states.
    """
    dataset = Dataset.open(dataset_folder)
    episode = next((episode for episode in dataset.episodes if episode.success), None)
    if episode is None:
        raise DatasetError(f"{dataset_folder}: holds no successful episode to show")
    arrays = dataset.read(episode)
    if not arrays["states"].shape[1]:
        raise DatasetError(f"{episode.path}: holds no simulation states; it cannot be drawn from outside")
    keys = [f"obs/{key}" for key in dataset.embodiment.image_keys if f"obs/{key}" in arrays]
    images = [[arrays[key][step] for key in keys] for step in range(episode.steps)]
    view = OutsideView(parse_task(dataset.tasks[episode.task], source=f"{dataset_folder}/meta.json"))
    try:
        return write_video(path, view.frames(list(arrays["states"]), images), dataset.embodiment.control_hz)
    finally:
        view.close()

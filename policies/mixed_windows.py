"""Training data from two sources in a given proportion: few real demonstrations and many simulated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.filters import has_filter
from simtoreal.envs.errors import ConfigError
from simtoreal.policies.config import PolicyConfig
from simtoreal.policies.training_data import TrainingData, Windows, fit_all, open_training_data


class MixedWindows:
    """The windows of several sources, one source after the other; images stay where they are.

    Args:
        sources: windows with the same keys.

    Attributes:
        actions: ``(N, A)`` of all sources.
        observations: key -> ``(N, ...)`` of all sources, vectors only.
        keep: ``(N,)`` bool: steps that the filters of the sources keep.
        source_of_window: ``(W,)`` index of the source of every window.
    """

    def __init__(self, sources: Sequence[Windows]) -> None:
        self.sources = list(sources)
        self.actions = np.concatenate([source.actions for source in sources])
        self.keep = np.concatenate([getattr(source, "keep", np.ones(len(source.actions), bool)) for source in sources])
        vectors = [key for key, values in sources[0].observations.items() if values.ndim == 2]
        self.observations: Mapping[str, np.ndarray] = {
            key: np.concatenate([source.observations[key] for source in sources]) for key in vectors
        }
        lengths = [len(source) for source in sources]
        self.source_of_window = np.repeat(np.arange(len(sources)), lengths)
        self._first = np.cumsum([0, *lengths[:-1]])

    def __len__(self) -> int:
        return len(self.source_of_window)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Gather windows; see :meth:`simtoreal.data_collection.windows.WindowSampler.batch`."""
        source = self.source_of_window[indices]
        order = np.argsort(source, kind="stable")
        back = np.argsort(order, kind="stable")
        parts = [
            self.sources[number].batch(indices[source == number] - self._first[number]) for number in np.unique(source)
        ]

        def joined(values: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(values)[back]

        texts = [text for part in parts for text in part["instruction"]]
        return {
            "observation": {
                key: joined([part["observation"][key] for part in parts]) for key in parts[0]["observation"]
            },
            "actions": joined([part["actions"] for part in parts]),
            "action_mask": joined([part["action_mask"] for part in parts]),
            "instruction": [texts[row] for row in back],
        }


def find_filter(folders: Sequence[str | Path], filter: str | None) -> list[str | None]:
    """Return the name of the filter for each of the dataset folders that has it, and None for the others.

    Raises:
        ConfigError: none has it.
    """
    found = [filter if filter is not None and has_filter(path, filter) else None for path in folders]
    if filter is not None and not any(found):
        listed = ", ".join(map(str, folders))
        raise ConfigError(f"none of {listed} has a filter '{filter}'; make it with 'simtoreal data filter'")
    return found


def open_mixed_data(
    real: Sequence[str | Path],
    simulated: Sequence[str | Path],
    config: PolicyConfig,
    *,
    real_share: float,
    filter: str | None = None,
) -> TrainingData:
    """Open demonstrations of both worlds for the first stage of RL-Co (arXiv 2602.12628, §3): batches are drawn with
    probability α from the real ones.

    Args:
        real: dataset folders; their held-out episodes validate.
        simulated: dataset folders.
        config: gives keys and window sizes.
        real_share: α; 1 learns from the real ones only, and ``simulated`` may be empty then.
        filter: learn only from the steps that this filter keeps, in the folders that have it.

    Raises:
        ConfigError: the share is not in (0, 1], a world has no data, or no folder has the filter.
        DatasetError, EmbodimentMismatchError: see :func:`~simtoreal.policies.training_data.open_training_data`; all
            folders must be of one embodiment.
    """
    if not 0 < real_share <= 1:
        raise ConfigError(f"real_share is {real_share}; expected a share in (0, 1]")
    if not real or (real_share < 1 and not simulated):
        missing = "simulated" if real else "real"
        raise ConfigError(f"there are no {missing} demonstrations to mix; give a dataset folder, or real_share 1")
    chosen = [*real, *(simulated if real_share < 1 else ())]
    filters = find_filter(chosen, filter)
    first = open_training_data(chosen[0], config, filter=filters[0])
    opened = [first]
    for path, own in zip(chosen[1:], filters[1:], strict=True):
        opened.append(open_training_data(path, config, filter=own, embodiment=first.embodiment))
    windows = MixedWindows([data.train for data in opened])
    is_real = windows.source_of_window < len(real)
    probabilities = np.where(is_real, real_share / is_real.sum(), (1 - real_share) / max(1, (~is_real).sum()))
    held_out = [data.valid for data in opened[: len(real)] if data.valid is not None]
    tasks = [data.task for data in opened]
    return TrainingData(
        embodiment=first.embodiment,
        task=first.task if all(task == first.task for task in tasks) else {},
        train=windows,
        valid=MixedWindows(held_out) if held_out else None,
        statistics=fit_all(windows, first.embodiment, config),
        source=", ".join(map(str, chosen)),
        seeds=tuple(sorted({seed for data in opened for seed in data.seeds})),
        probabilities=probabilities if len(chosen) > 1 else None,
        notes=tuple(note for data in opened for note in data.notes),
    )

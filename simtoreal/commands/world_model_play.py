"""Watch a world model: recorded episodes beside what it imagines under the same actions, or under altered ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simtoreal.envs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model is given the first frame and the actions, nothing else. Each column is one video, each row a camera."""

    model: Path
    """Run folder of the world model."""
    data: tuple[Path, ...]
    """Dataset folders to take the episodes from; those that the model did not learn from come first."""
    output: Path
    """Video file (.mp4)."""
    episodes: int = 4
    """Episodes, one after the other."""
    alter: tuple[Literal["still", "reversed", "swapped"], ...] = ()
    """Further columns: no motion at all, every motion the other way round, or the actions of the next episode. A model
    that shows the same as before does not obey its actions."""
    seed: int = 0
    """Of the noise of a model that generates at random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto uses a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.seed < 0:
            raise ConfigError("--episodes must be at least 1 and --seed not negative")
        if self.output.suffix.lower() != ".mp4":
            raise ConfigError(f"--output is {self.output}; expected the name of a video that ends in .mp4")


def main(config: Config) -> None:
    """Imagine and write the video.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: actions cannot be altered as asked for.
        DatasetError: the data are missing or damaged.
        EmbodimentMismatchError: model and data are of different embodiments or render profiles.
    """
    import numpy as np
    from rich.console import Console

    from simtoreal.policies.distributed import choose_device
    from simtoreal.world_models.checkpoint import load_world_model
    from simtoreal.world_models.clips import altered_actions, imagine_clips, real_clips
    from simtoreal.world_models.learned_episodes import fresh_episodes
    from simtoreal.world_models.side_by_side import write_side_by_side
    from simtoreal.world_models.video_data import open_video_data

    console = Console(markup=False)
    loaded = load_world_model(config.model, choose_device(None if config.device == "auto" else config.device))
    data = open_video_data(config.data, embodiment=loaded.embodiment)
    fresh = fresh_episodes(loaded, data)
    order = np.concatenate([np.flatnonzero(fresh), np.flatnonzero(~fresh)])
    chosen = order[: config.episodes]
    columns = {"real": real_clips(loaded.model, data, chosen)}
    columns["imagined"] = imagine_clips(loaded.model, data, chosen, seed=config.seed)
    for name in dict.fromkeys(config.alter):
        actions = altered_actions(data, chosen, name)
        columns[name] = imagine_clips(loaded.model, data, chosen, actions, seed=config.seed)
    episodes = [
        {label: clips.images[clips.starts[row] : clips.ends[row]] for label, clips in columns.items()}
        for row in range(len(chosen))
    ]
    path = write_side_by_side(config.output, episodes, loaded.embodiment.control_hz)
    learned = int((~fresh[chosen]).sum())
    note = f" (the model learned from {learned} of them)" if learned else ""
    console.print(f"{len(chosen)} episodes{note}, columns {', '.join(columns)} -> {path}", soft_wrap=True)

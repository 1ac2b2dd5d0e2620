"""Watch a dataset: write a video with many episodes side by side, or a rerun recording."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from simtoreal.envs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Episodes are spread evenly over the dataset."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""
    episodes: int = 12
    """How many episodes to show; with --rerun, only the first of them."""
    camera: str = "front"
    """Camera to show."""
    mask: str | None = None
    """Show only episodes of this mask, e.g. failure or valid; default: all."""
    rerun: bool = False
    """Write a rerun recording (.rrd) of one episode instead of a video; needs the extra 'rerun'."""
    output: Path | None = None
    """File to write; default: preview.mp4 (or .rrd) in the dataset folder."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ConfigError(f"--episodes is {self.episodes}, expected at least 1")
        suffix = ".rrd" if self.rerun else ".mp4"
        if self.output is not None and self.output.suffix.lower() != suffix:
            raise ConfigError(f"--output is {self.output}, expected a name that ends in {suffix}")


def main(config: Config) -> None:
    """Write the file and print its path."""
    import numpy as np
    from rich.console import Console

    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.data_collection.preview import contact_sheet, show_in_rerun
    from simtoreal.envs.errors import DatasetError

    dataset = Dataset.open(config.dataset)
    found = dataset.filter(config.mask)
    if not found:
        raise DatasetError(f"{config.dataset}: holds no episodes to show.")
    rows = np.unique(np.linspace(0, len(found) - 1, min(config.episodes, len(found))).round().astype(int))
    chosen = [found[row] for row in rows]
    if config.rerun:
        path = show_in_rerun(dataset, chosen[0], config.output or config.dataset / "preview.rrd")
    else:
        path = contact_sheet(dataset, chosen, config.camera, config.output or config.dataset / "preview.mp4")
    Console(markup=False).print(
        f"{len(chosen) if not config.rerun else 1} of {len(found)} episodes: {path}", soft_wrap=True
    )

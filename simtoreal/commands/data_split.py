"""Divide a dataset at random into new ones; episode files are hard-linked, not duplicated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Config:
    """The source stays as it is. Training needs no split: masks 'train' and 'valid' exist in every dataset."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""
    output: Path
    """Folder below which the new datasets are made, one per part."""
    parts: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "test": 0.2})
    """Name and share of the episodes of every part, e.g. --parts train 0.8 test 0.2; at most 1 together."""
    seed: int = 0
    """Decides which episodes go where."""


def main(config: Config) -> None:
    """Split and write results.json."""
    from rich.console import Console

    from simtoreal.data_collection.edit import split
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance

    datasets = split(config.dataset, config.output, config.parts, seed=config.seed)
    counts = {name: len(dataset.episodes) for name, dataset in datasets.items()}
    result = {"source": str(config.dataset), "parts": counts}
    write_json(config.output / "results.json", {"split": result, "provenance": provenance([config.seed])})
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    Console().print(f"{config.output}: episodes per part: {listed}", soft_wrap=True)

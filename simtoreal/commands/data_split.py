"""Divide a dataset at random into new ones; episode files are hard-linked, not duplicated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from simtoreal.envs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The source stays as it is. Training needs no split: masks 'train' and 'valid' exist in every dataset."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""
    output: Path
    """Folder below which the new datasets are made, one per part."""
    parts: tuple[str, ...] = ("train=0.8", "test=0.2")
    """NAME=SHARE of every part, with any names, e.g. --parts small=0.1 large=0.9; at most 1 together."""
    seed: int = 0
    """Decides which episodes go where."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; expected at least 0")


def read_parts(parts: tuple[str, ...]) -> dict[str, float]:
    """Return name -> share of texts such as ``train=0.8``.

    Raises:
        ConfigError: one is not a NAME=SHARE, names no folder, or occurs twice.
    """
    shares: dict[str, float] = {}
    for part in parts:
        name, _, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(f"--parts: '{part}' is not NAME=SHARE, for instance train=0.8 (NAME becomes a folder)")
        if name in shares:
            raise ConfigError(f"--parts: '{name}' occurs twice")
        shares[name] = value
    return shares


def main(config: Config) -> None:
    """Split and write results.json."""
    from rich.console import Console

    from simtoreal.data_collection.edit import split
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance
    from simtoreal.evaluation.results import require_own_folder

    require_own_folder(config.output, "split")
    parts = split(config.dataset, config.output, read_parts(config.parts), seed=config.seed)
    counts = {name: len(part.names) for name, part in parts.items()}
    result = {"source": str(config.dataset), "parts": counts}
    write_json(config.output / "results.json", {"split": result, "provenance": provenance([config.seed])})
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    Console(markup=False).print(f"{config.output}: episodes per part: {listed}", soft_wrap=True)

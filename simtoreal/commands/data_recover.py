"""Repair a dataset after a crash: unfinished episodes become aborted ones, unreadable files are set aside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing that holds data is deleted; unreadable files move to DIR/damaged."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""


def main(config: Config) -> None:
    """Repair and say what was done."""
    from rich.console import Console
    from rich.table import Table

    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.data_collection.edit import recover

    console = Console(markup=False)
    recovery = recover(config.dataset)
    table = Table(title=str(config.dataset))
    for name in ("file", "what was done"):
        table.add_column(name)
    for episode in recovery.recovered:
        table.add_row(f"{episode.name}.hdf5", f"recovered {episode.steps} steps, marked {episode.failure}")
    for file in recovery.emptied:
        table.add_row(file.name, "held nothing that is not stored, removed")
    for file, reason in recovery.set_aside:
        table.add_row(file.name, f"moved to {file.parent}: {reason}")
    for name in recovery.missing:
        table.add_row(f"{name}.hdf5", "is missing, dropped from the list")
    if table.row_count:
        console.print(table)
    count = len(Dataset.open(config.dataset).episodes)
    console.print(
        f"{config.dataset}: {count} readable episodes, {len(recovery.recovered)} of them recovered now, "
        f"{len(recovery.set_aside)} set aside, {len(recovery.missing)} missing",
        soft_wrap=True,
    )

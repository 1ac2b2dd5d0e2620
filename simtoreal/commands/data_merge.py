"""Join datasets of one embodiment into a new one; episode files are hard-linked, not duplicated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sources stay as they are."""

    datasets: tyro.conf.Positional[tuple[Path, ...]]
    """Dataset folders, in the order of their episodes in the result."""
    output: Path
    """Folder of the new dataset."""


def main(config: Config) -> None:
    """Merge and write results.json."""
    from rich.console import Console

    from simtoreal.data_collection.edit import merge
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance

    merged = merge(config.datasets, config.output)
    statistics = merged.dataset.meta["statistics"]
    result = {
        "sources": [str(source) for source in config.datasets],
        "episodes": statistics["episodes"],
        "steps": statistics["steps"],
        "notes": list(merged.notes),
    }
    write_json(config.output / "results.json", {"merge": result, "provenance": provenance()})
    console = Console(markup=False)
    for note in merged.notes:
        console.print(note, style="yellow", soft_wrap=True)
    console.print(
        f"{config.output}: {result['episodes']} episodes of {len(config.datasets)} datasets, {result['steps']} steps",
        soft_wrap=True,
    )

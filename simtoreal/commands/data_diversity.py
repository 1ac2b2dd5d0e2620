"""Show which of the ways to do its task a dataset holds, and how evenly, also for a mask or filter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from simtoreal.data_collection.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Config:
    """Entropy of the behaviours of the successful episodes: 0 for one way only, 1 for all alike (D3IL)."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder. Behaviours are those that the task's file names (avoid, align); of other data, also foreign ones,
    they are clusters of the motions, if there are clear ones."""
    mask: tuple[str, ...] = ()
    """Masks or filters to show beside the whole dataset, e.g. --mask compatible."""


def main(config: Config) -> None:
    """Print one column per mask."""
    from rich.console import Console
    from rich.table import Table

    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.data_collection.diversity import dataset_diversity

    console = Console(markup=False)
    dataset = Dataset.open(config.dataset)
    if not any(task.get("behaviors") for task in dataset.tasks.values()):
        _show_unlabelled(dataset, config, console)
        return
    columns = {"all": dataset_diversity(dataset)}
    columns |= {mask: dataset_diversity(dataset, mask) for mask in config.mask}
    table = Table(title=str(config.dataset))
    table.add_column("behaviour")
    for name in columns:
        table.add_column(name, justify="right")
    for behavior in columns["all"]["counts"]:
        table.add_row(behavior, *(str(column["counts"].get(behavior, 0)) for column in columns.values()))
    table.add_section()
    for label, key in (("successes", "successes"), ("of episodes", "episodes"), ("without a label", "unlabelled")):
        table.add_row(label, *(str(column[key]) for column in columns.values()))
    table.add_row("ways seen", *(f"{column['seen']} of {column['behaviors']}" for column in columns.values()))
    table.add_row("entropy", *(f"{column['entropy']:.3f}" for column in columns.values()))
    table.add_row("entropy, Miller-Madow", *(f"{column['entropy_miller_madow']:.3f}" for column in columns.values()))
    console.print(table)
    parts = [f"{name} {column['entropy']:.3f}" for name, column in columns.items()]
    console.print(f"{config.dataset}: entropy of its behaviours: {', '.join(parts)}", highlight=False, soft_wrap=True)


def _show_unlabelled(dataset: Dataset, config: Config, console: Console) -> None:
    from rich.table import Table

    from simtoreal.data_collection.diversity_unlabelled import unlabelled_diversity

    names = ["all", *config.mask]
    found = unlabelled_diversity(dataset, [None, *config.mask])
    table = Table(title=f"{config.dataset}: clusters of the motions of successful episodes")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for mode in range(found[0]["modes"]) if found[0]["modes"] > 1 else ():
        table.add_row(f"mode {mode}", *(str(column["counts"][mode]) for column in found))
    table.add_section()
    for label, key in (("successes", "successes"), ("of episodes", "episodes"), ("clear modes", "modes")):
        table.add_row(label, *(str(column[key]) for column in found))
    table.add_row("entropy of the modes", *(f"{column['entropy']:.3f}" for column in found))
    table.add_row("effective number of episodes", *(f"{column['effective_episodes']:.1f}" for column in found))
    console.print(table)
    parts = [f"{name} {column['effective_episodes']:.1f}" for name, column in zip(names, found, strict=True)]
    console.print(
        f"{config.dataset}: clear modes {found[0]['modes']}; effective number of episodes: {', '.join(parts)}",
        highlight=False,
        soft_wrap=True,
    )

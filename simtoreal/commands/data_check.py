"""Derive every index, length, mask, link, statistic and view of a dataset anew; exit with 1 if anything differs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

EXIT_PROBLEMS = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing is changed. Every value of every episode is read."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""
    output: Path | None = None
    """Folder to write results.json to, with every problem."""


def main(config: Config) -> None:
    """Check and print.

    Raises:
        DatasetError: the folder is not a dataset.
        SystemExit: 1 if there are problems.
    """
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from simtoreal.data_collection.check import check
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance
    from simtoreal.evaluation.results import require_own_folder

    if config.output is not None:
        require_own_folder(config.output, "check")
    console = Console(markup=False)
    result = check(config.dataset)
    if config.output is not None:
        write_json(
            config.output / "results.json", {"check": dataclasses.asdict(result), "provenance": provenance()}
        )  # fmt: skip
    for note in result.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    if not result.problems:
        console.print(
            f"{config.dataset}: {result.episodes} episodes, {result.steps} steps, {result.arrays} arrays: no problem",
            soft_wrap=True,
        )
        return
    table = Table(title=str(config.dataset))
    for name in ("where", "what is wrong", "remedy"):
        table.add_column(name, overflow="fold")
    for problem in result.problems:
        table.add_row(problem.where, problem.what, problem.remedy)
    console.print(table)
    console.print(f"{config.dataset}: {len(result.problems)} problems", style="red", soft_wrap=True)
    raise SystemExit(EXIT_PROBLEMS)
